// What the page does beside being read: it keeps itself up to date, and takes files that are dropped on it.
// Without it everything works, too: links lead on, forms are sent, and a reload shows what is new.
"use strict";

// ---- up to date: whenever something changed, ask for this page again and put in the parts that are not the same

const WAIT_MS = 250;
let asked = null;

// A part in which somebody writes or chooses is left as it is until they are done.
const isInUse = (part) => {
  const at = document.activeElement;
  return (part.contains(at) && at.matches("input, select, textarea"))
    || [...part.querySelectorAll("details.act[open], textarea")].some((one) => one.open || one.value);
};

// What has the focus, or is unfolded, is found again by its name.
const nameOf = (element) => element.id || element.getAttribute("href") || element.textContent.trim();

const replace = (part, fresh) => {
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  const open = [...part.querySelectorAll("details[open]")].map((one) => nameOf(one.firstElementChild));
  part.replaceWith(fresh);
  for (const one of fresh.querySelectorAll("details")) {
    if (open.includes(nameOf(one.firstElementChild))) one.open = true;
  }
  if (focused) {
    const same = [...fresh.querySelectorAll(focused.tagName)].find((one) => nameOf(one) === nameOf(focused));
    (same || document.getElementById("main")).focus({ preventScroll: true });
  }
};

const refresh = async () => {
  asked = null;
  if (document.hidden) return; // asked for again when it is looked at
  const answer = await fetch(location.href, { headers: { accept: "text/html" } });
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.title = fresh.title;
  for (const part of document.querySelectorAll("[data-part]")) {
    const one = fresh.getElementById(part.id);
    if (one && one.outerHTML !== part.dataset.shown && !isInUse(part)) {
      const shown = one.outerHTML;
      replace(part, document.adoptNode(one));
      one.dataset.shown = shown;
    }
  }
};

const soon = () => {
  if (asked === null) asked = setTimeout(() => refresh().catch(() => say(false)), WAIT_MS);
};

const say = (live) => {
  const line = document.getElementById("live");
  if (line) line.textContent = live ? "" : "· connection lost, trying again";
};

if (document.querySelector("[data-part]")) {
  const source = new EventSource("/api/v1/live");
  source.onopen = () => { say(true); soon(); };
  source.onerror = () => say(false);
  for (const kind of ["message", "changed", "progress"]) source.addEventListener(kind, soon);
  document.addEventListener("visibilitychange", soon);
  // A page that is left keeps no connection: browsers have six for each host.
  addEventListener("pagehide", () => source.close());
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
}

// ---- files that are dropped, anywhere on a page that has a place for them

const target = document.querySelector(".target");
if (target) {
  const files = target.querySelector("input[type=file]");
  const carries = (event) => [...event.dataTransfer.types].includes("Files");
  addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    target.classList.add("over");
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) target.classList.remove("over"); });
  addEventListener("drop", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    target.classList.remove("over");
    files.files = event.dataTransfer.files;
    target.requestSubmit();
  });
}

// ---- what is folded out for an action folds back with Escape

addEventListener("keydown", (event) => {
  const open = event.key === "Escape" && document.activeElement.closest("details.act[open]");
  if (open) {
    open.open = false;
    open.firstElementChild.focus();
  }
});
