// Keeps the page of a run that goes on up to date. The page stays where it is: what differs in the
// new one is put in place of the old, node by node, and what was scrolled, selected or opened by
// the reader keeps its state.
"use strict";
const badge = document.getElementById("live");
let etag = `"${badge.dataset.version}"`, last = new Date();
const say = (text) => { badge.textContent = text; };
function keys() {
  const seen = {};
  return [...document.querySelectorAll("details")].map((d) => {
    const name = (d.querySelector("summary") || d).textContent.replace(/[0-9.,]+/g, "#");
    seen[name] = (seen[name] || 0) + 1;
    return [d, name + seen[name]];
  });
}
function morph(a, b) {
  if (a.isEqualNode(b)) return;
  if (a.nodeType !== 1 || a.tagName !== b.tagName) { a.replaceWith(b); return; }
  for (const {name} of [...a.attributes]) if (!b.hasAttribute(name)) a.removeAttribute(name);
  for (const {name, value} of [...b.attributes])
    if (a.getAttribute(name) !== value) a.setAttribute(name, value);
  const olds = [...a.childNodes], news = [...b.childNodes];
  olds.forEach((old, i) => { if (i < news.length) morph(old, news[i]); else old.remove(); });
  a.append(...news.slice(olds.length));
}
function show(text) {
  // Another kind of page: the policy of this one allows the styles of this one alone.
  if (!text.includes(`data-styles="${badge.dataset.styles}"`)) { location.reload(); return; }
  const fresh = new DOMParser().parseFromString(text, "text/html");
  const open = new Set(keys().filter(([d]) => d.open).map(([, key]) => key));
  const before = new Set(keys().map(([, key]) => key));
  const [x, y] = [scrollX, scrollY];
  document.title = fresh.title;
  for (const id of ["live", "live-script"]) fresh.getElementById(id)?.remove();
  const kept = [badge, document.getElementById("live-script")];
  kept.forEach((node) => node.remove());
  morph(document.body, fresh.body);
  document.body.append(...kept);
  for (const [d, key] of keys()) if (before.has(key)) d.open = open.has(key);
  scrollTo(x, y);
}
async function poll() {
  if (!document.hidden) {
    try {
      const headers = etag ? {"If-None-Match": etag} : {};
      const answer = await fetch("/", {cache: "no-store", headers});
      if (answer.status !== 304) {
        const text = await answer.text();
        etag = answer.headers.get("ETag");
        show(text);
      }
      last = new Date();
      say("live, as of " + last.toLocaleTimeString());
    } catch (error) {
      say("no answer since " + last.toLocaleTimeString());
    }
  }
  setTimeout(poll, 2000);
}
poll();
