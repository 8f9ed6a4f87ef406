"""The form and the file: every key goes from one to the other and back, and families' own keys appear by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_configfile import BUCKET, CHANGED

from slider_plugin.config import BucketConfig, RunConfig
from slider_plugin.configfile import read_config, to_json
from slider_plugin.registry import Plugins

ROOT = Path(__file__).parents[2]


class Inputs(HTMLParser):
    """What a browser would send of the form."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: dict[str, str] = {}
        self._inside, self._area, self._select, self._option = False, "", "", None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attributes}
        if tag == "form":
            self._inside = found.get("id") == "form-itself"
        if not self._inside:
            return
        if tag == "input" and found.get("type") in ("checkbox", "radio"):
            if "checked" in found:
                self.values[found["name"]] = found["value"]
        elif tag == "input" and "name" in found:
            self.values[found["name"]] = found.get("value", "")
        elif tag == "textarea":
            self._area, self.values[found["name"]] = found["name"], ""
        elif tag == "select":
            self._select = found["name"]
        elif tag == "option":
            self._option = found.get("value")
            if self._select not in self.values or "selected" in found:
                self.values[self._select], self._text = found.get("value", ""), "value" not in found

    def handle_data(self, data: str) -> None:
        if self._area:
            self.values[self._area] += data
        elif self._select and self._option is None and getattr(self, "_text", False) and data.strip():
            self.values[self._select], self._text = data, False

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False
        elif tag == "textarea" and self._area:  # the first line end after the tag is not part of it
            self.values[self._area], self._area = self.values[self._area].removeprefix("\n"), ""
        elif tag == "select":
            self._select = ""


def send(client: Any, name: str, **changes: str) -> Any:
    form = Inputs(client.get(f"/runs/{name}/setup").text).values | changes
    return client.post(f"/runs/{name}/setup", data=form)


def read(place: Path, name: str) -> RunConfig:
    return read_config(place / "runs" / name / "config.json", (), Plugins.discover().facts)[0]


@pytest.fixture
def full(place: Path) -> RunConfig:
    """A configuration in which no key has its default."""
    for name in (
        "first.safetensors",
        "style.safetensors",
        "outline.png",
        "first.png",
        "buckets.json",
        "prompts.json",
        "l.json",
    ):
        (place / name).write_text("{}")
    for name in ("adapters", "outlines", "org"):
        (place / name).mkdir()
    bucket = {"id": "more", "instance_data_dir": str(place / "data" / "more")} | BUCKET
    less = {"id": "less", "instance_data_dir": str(place / "data" / "less"), "slider_strength": 1.25, "maximum_image_size": 90}
    less |= {"target_downsample_size": 70.5, "instance_prompt": 'two\nlines, "quoted" & <b>'}
    plain = {"id": "plain", "instance_data_dir": str(place / "data" / "plain"), "slider_strength": 0}
    absent = {"id": "none", "instance_data_dir": str(place / "data" / "plain")}
    own = {"text_length", "guidance_embedding", "fast", "layout"}  # options of the family that this file's tests make up
    written = {key: value for key, value in CHANGED.items() if key not in own}
    written |= {"lora_type": "lycoris", "lycoris": {"algo": "loha", "linear_dim": 8, "apply_preset": {"target_module": ["a"]}}}
    written |= {
        "buckets": [bucket, less, plain, absent],
        "timestep_shift": 2.5,
        "optimizer_config": {"min_8bit_size": 16, "x": True},
    }
    written |= {"prompts": [{"name": "a", "prompt": " two\nlines "}, {"name": "b", "prompt": "", "adapter_strength": -2}]}
    for key in ("output_dir", "cache_dir", "init_lora", "assistant_lora_path", "validation_control_image", "validation_image"):
        written[key] = str(place / written[key])
    written["base_loras"] = [{"path": str(place / "style.safetensors"), "weight": -0.5}]
    (place / "config.json").write_text(json.dumps(written))
    return read_config(place / "config.json", (), Plugins.discover().facts)[0]


def test_every_key_goes_through_the_form_and_back(client: Any, place: Path, full: RunConfig) -> None:
    usual = RunConfig(model_family="sd1")
    same = {name for name in RunConfig.model_fields if getattr(full, name) == getattr(usual, name)}
    sources = {"model_type", "data_backend_config", "user_prompt_library", "validation_prompt", "lycoris_config"}
    assert same <= sources | {"family_options"}, "keys that this test would not see lost"
    assert client.post("/runs", data={"name": "one", "source": "config.json"}).status_code == 303
    for _ in range(2):
        answer = send(client, "one")
        assert "Saved." in answer.text, answer.text
        came = read(place, "one")
        assert {k: v for k, v in came if v != getattr(full, k)} == {"output_dir": place / "runs" / "one" / "output"}


@pytest.mark.parametrize(
    "key", [k for k in RunConfig.model_fields if k not in ("buckets", "prompts", "base_loras", "family_options")]
)
def test_every_key_has_its_field(client: Any, key: str) -> None:
    client.post("/runs", data={"name": "one", "family": "sd1"})
    text = client.get("/runs/one/setup").text
    assert f'name="k.{key}"' in text
    assert f'for="f-k-{key}"' in text, "and the field has its label"


def test_every_key_of_a_bucket_has_its_field(client: Any) -> None:
    client.post("/runs", data={"name": "one", "family": "sd1"})
    text = client.get("/runs/one/setup").text
    names = {"slider_strength": "direction"}
    assert all(f'name="b.0.{names.get(key, key)}"' in text for key in BucketConfig.model_fields)


def test_the_checkbox_of_the_specification(client: Any, place: Path) -> None:
    """Advanced, "Use slider LoRA targets": what it writes is what the command line reads."""
    client.post("/runs", data={"name": "one", "family": "sd1"})
    text = client.get("/runs/one/setup").text
    part = text.partition('id="adv-adapter"')[2].partition("</details>")[0]
    assert "<summary>Advanced</summary>" in part and ">Use slider LoRA targets</label>" in part
    form = Inputs(text).values
    assert form.pop("k.slider_lora_target") == "on"
    client.post("/runs/one/setup", data=form)
    file = place / "runs" / "one" / "config.json"
    assert "slider_lora_target" not in json.loads(file.read_text())
    client.post("/runs/one/setup", data=form | {"k.slider_lora_target": "on"})
    assert json.loads(file.read_text())["slider_lora_target"] is True


@pytest.mark.parametrize(
    ("direction", "amount", "strength"),
    [("more", "0.5", 0.5), ("less", "0.75", -0.75), ("less", "-0.75", -0.75), ("neutral", "0.5", 0.0), ("neutral", "", None),
     ("more", "", 0.5), ("less", "0", -0.5)],
)  # fmt: skip
def test_sides_of_a_bucket(client: Any, place: Path, direction: str, amount: str, strength: float | None) -> None:
    client.post("/runs", data={"name": "one", "family": "sd1"})
    answer = send(client, "one", **{"b.0.instance_data_dir": "data/more", "b.1.instance_data_dir": "data/less",
                                    "b.0.direction": direction, "b.0.amount": amount})  # fmt: skip
    assert "Saved." in answer.text
    assert read(place, "one").buckets[0].slider_strength == strength


def test_what_is_wrong_is_told_at_its_field(client: Any, place: Path) -> None:
    client.post("/runs", data={"name": "one", "family": "sd1"})
    folders = {"b.0.instance_data_dir": "data/more", "b.1.instance_data_dir": "data/less"}
    answer = send(client, "one", **folders, **{"k.lora_rank": "many", "b.1.repeats": "-1", "b.0.amount": "lots"}).text
    for place_of, words in (("f-k-lora_rank", "is not a whole number"), ("f-b-1-repeats", "must be at least 0"),
                            ("f-b-0-slider_strength", "is not a number")):  # fmt: skip
        line = next(line for line in answer.splitlines() if f'data-place="{place_of}"' in line)
        assert words in line
    shown = client.get("/runs/one/setup").text
    assert 'value="many"' in shown, "what was written wrong is there to be corrected"


def test_rows_are_added_and_removed(client: Any, place: Path) -> None:
    client.post("/runs", data={"name": "one", "family": "sd1"})
    send(client, "one", action="add-buckets")
    send(client, "one", action="add-prompts")
    send(client, "one", action="remove-buckets-0")
    written = json.loads((place / "runs" / "one" / "config.json").read_text())
    assert [row["id"] for row in written["buckets"]] == ["less", "bucket-1"]
    assert [row["name"] for row in written["prompts"]] == ["prompt-1"]
    send(client, "one", action="remove-buckets-7")
    assert len(json.loads((place / "runs" / "one" / "config.json").read_text())["buckets"]) == 2


def test_files_that_a_key_names_are_read_into_the_form(client: Any, place: Path) -> None:
    entries = [{"id": "many", "instance_data_dir": "data/more", "slider_strength": 1}]
    (place / "buckets.json").write_text(json.dumps(entries))
    client.post("/runs", data={"name": "one", "family": "sd1"})
    send(client, "one", action="remove-buckets-0")
    send(client, "one", action="remove-buckets-0")
    answer = send(client, "one", **{"k.data_backend_config": "buckets.json"})
    assert 'value="many"' in answer.text and answer.headers["hx-retarget"] == "#form"
    written = json.loads((place / "runs" / "one" / "config.json").read_text())
    assert "data_backend_config" not in written and written["buckets"][0]["id"] == "many"


def test_keys_that_the_form_does_not_know_stay(client: Any, place: Path) -> None:
    client.post("/runs", data={"name": "one", "family": "sd1"})
    file = place / "runs" / "one" / "config.json"
    written = json.loads(file.read_text()) | {"not_a_key": [1, 2]}
    client.post("/runs/one/text", data={"text": json.dumps(written)})
    send(client, "one", **{"k.lora_rank": "3"})
    assert json.loads(file.read_text())["not_a_key"] == [1, 2] and json.loads(file.read_text())["lora_rank"] == 3


# --- Families ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place_package: Callable[[Path, Path], None]) -> None:
    """Pocket, as `pip install` leaves it."""
    site = tmp_path / "site"
    site.mkdir()
    place_package(ROOT / "fixtures" / "third-party-family", site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delenv("SLIDER_PLUGIN_ALLOW")


def test_a_third_party_s_family_is_there_with_its_options(
    third_party: None, place: Path, make_client: Callable[..., Any]
) -> None:
    with make_client(place) as client:
        assert '<option value="pocket">Pocket</option>' in client.get("/").text
        client.post("/runs", data={"name": "one", "family": "sd1"})
        assert "pocket_time_scale" not in client.get("/runs/one/setup").text
        folders = {"b.0.instance_data_dir": "data/more", "b.1.instance_data_dir": "data/less"}
        answer = send(client, "one", action="family", **{"k.model_family": "pocket"}, **folders).text
        assert 'name="o.pocket_time_scale"' in answer and "what sigma is multiplied by" in answer
        assert "Saved." in send(client, "one", **{"o.pocket_time_scale": "10.5"}).text
        assert read(place, "one").family_options == {"pocket_time_scale": 10.5}
        assert "is not a number" in send(client, "one", **{"o.pocket_time_scale": "fast"}).text
        send(client, "one", action="family", **{"k.model_family": "sd1"})
        assert "pocket_time_scale" not in json.loads((place / "runs" / "one" / "config.json").read_text())


def test_every_family_s_options_go_through_the_form(client: Any, place: Path) -> None:
    plugins = Plugins.discover()
    seen = 0
    for name in plugins.families():
        facts = plugins.facts(name)
        if not facts.options:
            continue
        client.post("/runs", data={"name": name, "family": name})
        other = {
            bool: lambda o: "" if o.default else "on",
            str: lambda o: next((c for c in o.choices if c != o.default), "word"),
        }
        values = {f"o.{o.name}": other.get(o.type, lambda o: str((o.default or 0) + 1))(o) for o in facts.options}
        folders = {"b.0.instance_data_dir": "data/more", "b.1.instance_data_dir": "data/less"}
        assert "Saved." in send(client, name, **folders, **values).text, name
        config = read(place, name)
        assert all(config.family_options[o.name] != o.default for o in facts.options), name
        assert to_json(config)
        seen += 1
    assert seen
