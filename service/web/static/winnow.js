// What all pages do beyond HTML; each of them works without it.
"use strict";

const Winnow = {
  token: document.body.dataset.formToken || "",

  /** Replaces the children of a part of the page; what has the focus keeps it, and what was opened stays open. */
  replace(part, html) {
    const focus = part.contains(document.activeElement) ? document.activeElement.id : "";
    const open = [...part.querySelectorAll("details[open][id]")].map((each) => each.id);
    const scrolled = [...part.querySelectorAll(".scroll, .text")].map((each) => [each.scrollLeft, each.scrollTop]);
    part.innerHTML = html;
    for (const id of open) { const found = document.getElementById(id); if (found) found.open = true; }
    [...part.querySelectorAll(".scroll, .text")].forEach((each, i) => {
      if (scrolled[i]) [each.scrollLeft, each.scrollTop] = scrolled[i];
    });
    if (focus) document.getElementById(focus)?.focus({preventScroll: true});
  },

  /** Asks for a part of a page, and again with its ETag: no answer is read twice. Whoever is logged out gets the login. */
  async load(part) {
    const headers = part.dataset.tag ? {"If-None-Match": part.dataset.tag} : {};
    let answer;
    try {
      answer = await fetch(part.dataset.from, {headers, credentials: "same-origin"});
    } catch { return true; }  // the server is away: the next time
    if (answer.status === 401 || answer.status === 404) { location.reload(); return false; }
    if (answer.status === 200) {
      part.dataset.tag = answer.headers.get("ETag") || "";
      Winnow.replace(part, await answer.text());
      part.dispatchEvent(new CustomEvent("winnow:replaced", {bubbles: true}));
    }
    return answer.headers.get("X-Final") !== "true";
  },

  /** Keeps a part up to date: <div data-from="/jobs/rows" data-every="3">. Not while nobody looks at the page. */
  follow(part) {
    const seconds = Number(part.dataset.every);
    let timer;
    const next = () => { timer = setTimeout(tick, seconds * 1000); };
    const tick = async () => {
      if (document.hidden) return;
      if (await Winnow.load(part)) next();
    };
    document.addEventListener("visibilitychange", () => { clearTimeout(timer); if (!document.hidden) tick(); });
    next();
  },
};

document.querySelectorAll("[data-from][data-every]").forEach(Winnow.follow);
