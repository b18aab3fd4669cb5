// What the page does beside being read: it keeps itself up to date, and takes files that are dropped on it.
// Without it everything works, too: links lead on, forms are sent, and a reload shows what is new.
"use strict";

// ---- Up to date: whenever something changed, ask for this page again and put in the parts that are not the same.
// So what is drawn is drawn in one place, by the server, and a part that was missed is there with the next change.

const PARTS = "[data-part]";
const WAIT_MS = 200;
const shown = new Map([...document.querySelectorAll(PARTS)].map((part) => [part.id, part.outerHTML]));
let source = null;
let asked = null;

// A part in which somebody writes or chooses is left as it is until they are done.
const isInUse = (part) => part.querySelector("details.act[open]") !== null
  || (part.contains(document.activeElement) && document.activeElement.matches("input, select, textarea"));

// What has the focus, or is unfolded, is found again by its name.
const nameOf = (element) => element.id || element.getAttribute("href") || element.textContent.trim();

const replace = (part, fresh) => {
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  const open = [...part.querySelectorAll("details[open] > summary")].map(nameOf);
  part.replaceWith(fresh);
  for (const summary of fresh.querySelectorAll("details > summary")) {
    if (open.includes(nameOf(summary))) summary.parentElement.open = true;
  }
  if (focused) {
    const same = [...fresh.querySelectorAll(focused.tagName)].find((one) => nameOf(one) === nameOf(focused));
    (same || document.getElementById("main")).focus({ preventScroll: true });
  }
};

const say = (words) => { document.getElementById("live").textContent = words; };

const refresh = async () => {
  asked = null;
  const answer = await fetch(location.href, { headers: { accept: "text/html" } });
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.title = page.title;
  for (const part of document.querySelectorAll(PARTS)) {
    const fresh = page.getElementById(part.id);
    const text = fresh && fresh.outerHTML;
    if (fresh && text !== shown.get(part.id) && !isInUse(part)) {
      replace(part, document.adoptNode(fresh));
      shown.set(part.id, text);
    }
  }
};

const soon = () => {
  if (asked === null) asked = setTimeout(() => refresh().catch(() => say("· no connection")), WAIT_MS);
};

// A page that nobody looks at keeps no connection: a browser has six for each host.
const listen = () => {
  if (source) source.close();
  source = null;
  if (document.hidden) return;
  source = new EventSource("/api/v1/live");
  source.onopen = () => say("");
  source.onerror = () => say("· no connection");
  source.addEventListener("changed", soon);
  if (document.querySelector("[data-progress]")) source.addEventListener("progress", soon);
};

if (document.querySelector(`main ${PARTS}`)) {
  listen();
  document.addEventListener("visibilitychange", listen);
  addEventListener("pagehide", () => source && source.close());
}
// A page from the browser's memory would show what was, and a form that was sent.
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

// ---- Files that are dropped, anywhere on a page that has a place for them.

const target = () => document.querySelector(".target");
const carries = (event) => target() && [...event.dataTransfer.types].includes("Files");
addEventListener("dragover", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  target().classList.add("over");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) target()?.classList.remove("over"); });
addEventListener("drop", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  target().classList.remove("over");
  target().querySelector("input[type=file]").files = event.dataTransfer.files;
  target().requestSubmit();
});

// ---- A table: the page with its columns wants the same file again, and gets it from here.

const showTable = async (form, submitter, input) => {
  const answer = await fetch(form.action, { method: "post", body: new FormData(form, submitter), headers: { accept: "text/html" } });
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const main = document.adoptNode(page.getElementById("main"));
  main.querySelector("input[type=file]")?.replaceWith(input);
  document.title = page.title;
  document.getElementById("main").replaceWith(main);
  main.focus();
};
addEventListener("submit", (event) => {
  const input = event.target.querySelector("input[type=file]");
  if (!input || input.files.length !== 1 || /\.jsonl?$/i.test(input.files[0].name)) return;
  event.preventDefault();
  showTable(event.target, event.submitter, input).catch(() => say("· no connection"));
});

// ---- Forms: what changes something is sent once; what is folded out for it folds back with Escape.

addEventListener("submit", (event) => {
  if (event.target.method !== "post") return;
  const button = event.submitter || event.target.querySelector("button");
  setTimeout(() => { button.disabled = true; button.textContent = "Under way …"; });
});
addEventListener("keydown", (event) => {
  const open = event.key === "Escape" && document.activeElement.closest("details.act[open]");
  if (!open) return;
  open.open = false;
  open.firstElementChild.focus();
});

// ---- A blind review: a key presses its button.

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
  if (button) button.click();
});
