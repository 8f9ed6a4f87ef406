"use strict";
// The slider: moves over the pictures that were drawn, without asking anybody.
(() => {
  const MINUS = "\u2212";
  const words = (value) => (value === 0 ? "0" : (value > 0 ? "+" : MINUS) + String(+Math.abs(value).toPrecision(4)));
  const start = (root) => {
    const rows = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    if (!rows.length) return;
    const part = (name) => root.querySelector(`[data-part=${name}]`);
    const range = part("range"), picture = part("picture"), base = part("base"), wipe = part("wipe"), view = part("view");
    let row = rows[0], shown = 0, wanted = Number(read(`strength-${root.dataset.run}`) ?? 0);

    const nearest = (value) => row.strengths.reduce((best, s, i) => (Math.abs(s - value) < Math.abs(row.strengths[best] - value) ? i : best), 0);
    const draw = () => {
      const strength = row.strengths[shown];
      wanted = strength;
      keep(`strength-${root.dataset.run}`, strength);
      picture.src = row.images[shown];
      picture.alt = `${row.prompt}, strength ${words(strength)}, seed ${row.seed}`;
      part("value").textContent = words(strength);
      part("tag").textContent = words(strength);
      range.setAttribute("aria-valuetext", words(strength));
      root.querySelectorAll("[data-strength]").forEach((mark) => mark.setAttribute("aria-pressed", String(+mark.dataset.strength === strength)));
      part("strength")?.setAttribute("value", String(strength));
      compare();
    };
    const compare = () => {
      const zero = row.strengths.indexOf(0), on = part("compare").checked && zero >= 0;
      part("compare").disabled = zero < 0;
      [base, wipe, part("divide"), part("basetag")].forEach((one) => { one.hidden = !on; });
      picture.classList.toggle("after", on);
      picture.style.clipPath = on ? `inset(0 0 0 ${wipe.value}%)` : "";
      part("divide").style.left = `${wipe.value}%`;
      if (on) base.src = row.images[zero];
    };
    const choose = (index) => {
      row = rows[index];
      row.images.forEach((source) => { new Image().src = source; });
      range.min = Math.min(...row.strengths);
      range.max = Math.max(...row.strengths);
      shown = nearest(wanted);
      range.value = row.strengths[shown];
      part("low").textContent = words(+range.min);
      part("high").textContent = words(+range.max);
      const marks = part("marks");
      marks.replaceChildren(...row.strengths.map((strength) => {
        const mark = document.createElement("button");
        mark.type = "button";
        mark.dataset.strength = strength;
        mark.textContent = words(strength);
        mark.addEventListener("click", () => { range.value = strength; shown = nearest(strength); draw(); });
        return mark;
      }));
      draw();
    };
    range.addEventListener("input", () => { shown = nearest(+range.value); draw(); });
    range.addEventListener("change", () => { range.value = row.strengths[shown]; });
    range.addEventListener("keydown", (event) => { // from picture to picture
      const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      shown = Math.max(0, Math.min(row.strengths.length - 1, shown + step));
      range.value = row.strengths[shown];
      draw();
    });
    part("compare").addEventListener("change", draw);
    wipe.addEventListener("input", compare);
    view.addEventListener("pointermove", (event) => {
      if (!part("compare").checked || !(event.buttons & 1)) return;
      const box = view.getBoundingClientRect();
      wipe.value = Math.round(100 * (event.clientX - box.left) / box.width);
      compare();
    });
    const rowChoice = part("row");
    rowChoice.addEventListener("change", () => choose(+rowChoice.value));
    const kept = Number(read(`row-${root.dataset.run}`) ?? 0);
    rowChoice.value = kept >= 0 && kept < rows.length ? kept : 0;
    rowChoice.addEventListener("change", () => keep(`row-${root.dataset.run}`, rowChoice.value));
    choose(+rowChoice.value);
  };
  // What is chosen stays so when the part comes anew; a page that is a file may have no store.
  const read = (key) => { try { return sessionStorage.getItem(key); } catch { return null; } };
  const keep = (key, value) => { try { sessionStorage.setItem(key, value); } catch { /* nothing is kept */ } };
  const begin = () => document.querySelectorAll("[data-stage]:not([data-begun])").forEach((root) => { root.dataset.begun = "yes"; start(root); });
  document.addEventListener("DOMContentLoaded", begin);
  document.addEventListener("htmx:afterSettle", begin);
  if (document.readyState !== "loading") begin();
})();
