// An open job: each of its events brings the page up to date, and while it computes so does a look every few seconds.
"use strict";

{
  const part = document.getElementById("live");
  const LEAST = 1200, USUAL = 3000, AGAIN = 2000;  // milliseconds: between two looks, without an event, after a lost stream
  let last = 0, timer, isFinal = "final" in part.dataset, stream, seen = "";
  part.dataset.from = part.dataset.live;

  const look = async () => {
    clearTimeout(timer);
    if (document.hidden || isFinal) return;
    last = Date.now();
    isFinal = !(await Winnow.load(part));
    if (!isFinal) timer = setTimeout(look, USUAL);
  };
  const soon = () => { clearTimeout(timer); timer = setTimeout(look, Math.max(0, last + LEAST - Date.now())); };

  // Named events of any name: an EventSource would have to know the names.
  const listen = async () => {
    if (document.hidden || isFinal || stream) return;
    stream = new AbortController();
    try {
      const headers = {Accept: "text/event-stream", ...(seen && {"Last-Event-ID": seen})};
      const answer = await fetch(part.dataset.events, {headers, signal: stream.signal});
      if (answer.status === 204) { stream = undefined; return soon(); }
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let read; !(read = await reader.read()).done;) {
        const ids = [...read.value.matchAll(/^id: (\d+)/gm)];
        if (ids.length) { seen = ids.at(-1)[1]; soon(); }
      }
    } catch { /* hidden, or the server is away */ }
    stream = undefined;
    soon();
    setTimeout(listen, AGAIN);
  };

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { clearTimeout(timer); stream?.abort(); } else { look(); listen(); }
  });
  if (!isFinal) { listen(); timer = setTimeout(look, USUAL); }

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.classList.remove("hidden");
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
}
