"use strict";
// The form: folders are picked in a dialog, problems are told at their fields, and fields that do not apply are put away.
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // --- the picker
  let target = null;
  const openPicker = (button) => {
    const dialog = one("#picker");
    target = button.dataset.target;
    const input = document.getElementById(target);
    const query = new URLSearchParams({ path: input.value || ".", want: button.dataset.want, target });
    htmx.ajax("GET", `/browse?${query}`, { target: "#picker", swap: "innerHTML" }).then(() => { if (!dialog.open) dialog.showModal(); });
  };
  const pick = (path) => {
    const input = document.getElementById(target);
    one("#picker").close();
    if (!input) return;
    input.value = path;
    ["input", "change"].forEach((kind) => input.dispatchEvent(new Event(kind, { bubbles: true })));
    input.focus();
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-pick], [data-picked], [data-close], [data-fill]");
    if (!button) return;
    if ("pick" in button.dataset) openPicker(button);
    else if ("picked" in button.dataset) pick(button.dataset.picked);
    else if ("close" in button.dataset) one(button.dataset.close)?.close?.();
  });

  // --- problems at their fields
  const showProblems = () => {
    all(".wrong[data-of]").forEach((line) => line.remove());
    all("[aria-invalid]").forEach((field) => { field.removeAttribute("aria-invalid"); field.removeAttribute("aria-describedby"); });
    all("#saved [data-place]").forEach((problem) => {
      const field = document.getElementById(problem.dataset.place);
      if (!field) return;
      const line = document.createElement("p");
      line.className = "wrong";
      line.dataset.of = field.id;
      line.id = `${field.id}-wrong`;
      line.textContent = problem.dataset.line;
      field.setAttribute("aria-invalid", "true");
      field.setAttribute("aria-describedby", line.id);
      field.closest(".field, .prompt, .bucket")?.append(line);
    });
  };
  const applies = () => {
    const lycoris = one("[name='k.lora_type']")?.value === "lycoris";
    all("[data-for]").forEach((part) => { part.hidden = (part.dataset.for === "lycoris") !== lycoris; });
    all(".bucket").forEach((bucket) => {
      const side = one("input[type=radio]:checked", bucket)?.value ?? "neutral";
      bucket.classList.remove("more", "less", "neutral");
      bucket.classList.add(side);
    });
  };
  document.addEventListener("htmx:afterSettle", () => { showProblems(); applies(); });
  document.addEventListener("change", applies);
  applies();

  // --- a plan is that of what stands in the form, or it is marked as old and nothing can be started from it
  let edits = 0, posted = 0, answered = 0;
  const mark = () => {
    const plan = one("#plan"), stale = edits > answered;
    if (!plan) return;
    plan.toggleAttribute("data-stale", stale);
    plan.setAttribute("aria-busy", String(stale));
    const start = one("#start", plan);
    if (start && stale) start.disabled = true;
  };
  document.addEventListener("input", (event) => { // not `change`, which a field says once more when it is left
    if (event.target.closest("#form-itself")) { edits += 1; mark(); }
  }, true); // before htmx hears of it and posts
  document.addEventListener("htmx:beforeRequest", (event) => {
    const verb = event.detail.requestConfig.verb, path = event.detail.requestConfig.path;
    if (verb === "post" && path.endsWith("/setup")) { edits += 1; posted = edits; mark(); }
    if (verb === "get" && path.endsWith("/plan")) event.detail.xhr.editsSeen = posted;
  });
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.xhr?.editsSeen !== undefined) answered = event.detail.xhr.editsSeen;
    mark();
  });

  // --- logs stay at their end, unless somebody reads
  document.addEventListener("htmx:beforeSwap", (event) => {
    const log = one("pre.log", event.detail.target);
    if (log) event.detail.target.dataset.end = log.scrollHeight - log.scrollTop - log.clientHeight < 24 ? "yes" : "no";
  });
  const opened = {}; // what somebody opened or closed stays so when its part of the page comes anew
  document.addEventListener("click", (event) => {
    const part = event.target.closest("summary")?.parentElement;
    if (part?.id) opened[part.id] = !part.open;
  });
  document.addEventListener("htmx:afterSwap", (event) => {
    all("details[id]").forEach((part) => { if (part.id in opened) part.open = opened[part.id]; });
    const log = one("pre.log", event.detail.target);
    if (log && event.detail.target.dataset.end !== "no") log.scrollTop = log.scrollHeight;
  });
  all("pre.log").forEach((log) => { log.scrollTop = log.scrollHeight; });

  // --- a session that has ended, or a server that is away
  document.addEventListener("htmx:sendError", () => { one("#away").hidden = false; });
  document.addEventListener("htmx:afterRequest", (event) => { if (event.detail.successful) one("#away").hidden = true; });
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.xhr.status >= 400 && event.detail.xhr.getResponseHeader("HX-Retarget")) event.detail.shouldSwap = true;
  });
})();
