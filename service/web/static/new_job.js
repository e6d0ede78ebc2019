// A new job: its plan as the form is filled, and files that are dropped or chosen become datasets without leaving the page.
"use strict";

{
  const form = document.getElementById("job"), plan = document.getElementById("plan");
  const headers = {"X-Form-Token": Winnow.token};
  let timer, asking;

  const ask = async () => {
    asking?.abort();
    asking = new AbortController();
    plan.setAttribute("aria-busy", "true");
    try {
      const answer = await fetch(form.dataset.plan, {
        method: "POST", headers, body: new URLSearchParams(new FormData(form)), signal: asking.signal,
      });
      if (answer.status === 401) location.reload();
      if (answer.ok) Winnow.replace(plan, await answer.text());
      plan.removeAttribute("aria-busy");
    } catch { /* asked again meanwhile, or the server is away */ }
  };
  const soon = () => { clearTimeout(timer); timer = setTimeout(ask, 600); };
  for (const kind of ["input", "change"]) {
    document.addEventListener(kind, (event) => { if (event.target.form === form) soon(); });
  }
  form.addEventListener("submit", (event) => {
    if (event.submitter?.value === "plan") { event.preventDefault(); soon(); }
  });
  document.getElementById("show-plan").classList.add("hidden");
  if (new FormData(form).get("pool")) soon();

  const problemOf = (answer) => {
    if (!answer) return "The server cannot be reached.";
    const lines = (answer.errors || []).slice(0, 5).map((each) => `${each.param}: ${each.message}`);
    return [answer.detail, ...lines].join("\n");
  };

  /** Sends the file; XMLHttpRequest, since fetch does not say how far it is. */
  const upload = (part, file) => {
    const role = part.dataset.role, state = part.querySelector(".upload-state");
    const say = (text, kind) => { state.textContent = text; state.className = `upload-state ${kind ? `message ${kind}` : "muted"}`; };
    const query = new URLSearchParams({role, name: file.name.slice(0, 256)});
    const request = new XMLHttpRequest();
    request.open("POST", `/datasets?${query}`);
    request.setRequestHeader("X-Form-Token", Winnow.token);
    request.setRequestHeader("Accept", "application/json");
    request.responseType = "json";
    request.upload.onprogress = ({loaded, total}) => say(
      loaded < total ? `Sending ${file.name}: ${Math.floor((100 * loaded) / total)} %` : `Reading ${file.name}`);
    request.onerror = () => say(problemOf(null), "bad");
    request.onload = () => {
      if (request.status !== 201) return say(problemOf(request.response), "bad");
      const made = request.response;
      for (const select of document.querySelectorAll("#pool, #target")) {
        const option = new Option(`${made.name} (${made.row_count.toLocaleString("en")} rows, just now)`, made.id);
        select.add(option, 1);
        if (select.id === role) select.value = made.id;
      }
      const left = made.skipped ? `; ${made.skipped} rows were left out` : "";
      say(`${made.name}: ${made.row_count.toLocaleString("en")} rows${left}`, "ok");
      soon();
    };
    say(`Sending ${file.name}`);
    request.send(file);
  };

  for (const part of document.querySelectorAll(".data")) {
    const drop = part.querySelector(".drop"), input = drop.querySelector("input[type=file]");
    part.querySelector(".drop-hint").classList.remove("hidden");
    drop.querySelector("button").classList.add("hidden");
    input.addEventListener("change", () => { if (input.files.length) upload(part, input.files[0]); });
    drop.addEventListener("submit", (event) => event.preventDefault());
    for (const kind of ["dragenter", "dragover"]) {
      part.addEventListener(kind, (event) => { event.preventDefault(); part.classList.add("over"); });
    }
    part.addEventListener("dragleave", (event) => { if (!part.contains(event.relatedTarget)) part.classList.remove("over"); });
    part.addEventListener("drop", (event) => {
      event.preventDefault();
      part.classList.remove("over");
      if (event.dataTransfer.files.length) upload(part, event.dataTransfer.files[0]);
    });
  }
}
