// The result: the budget slider, and the sample under the pointer on the map. Without this the form asks the server for another
// budget, and the tables have the links.
"use strict";

(() => {
  const found = document.getElementById("recut-data");
  if (!found) return;
  const data = JSON.parse(found.textContent);
  const slider = document.getElementById("slider");
  const budget = document.getElementById("budget");
  const pool = data.count[data.count.length - 1];
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const write = (id, text) => { document.getElementById(id).textContent = text; };
  const marker = document.querySelector("#chart-budgets .marker");
  const parts = [...document.querySelectorAll("#chart-recut .part")].slice(data.sources.length);
  const width = document.querySelector("#chart-recut svg").viewBox.baseVal.width;

  const cut = (place) => {
    const count = data.count[place];
    write("recut-count", count.toLocaleString("en"));
    write("recut-share", `${percent(count / data.samples)} of the pool`);
    write("recut-mean", data.mean[place]);
    write("recut-exact", percent(data.exact[place] / count));
    slider.setAttribute("aria-valuetext", `${count.toLocaleString("en")} samples`);
    for (const end of ["x1", "x2"]) marker.setAttribute(end, data.places[place]);
    let left = 0;
    data.sources.forEach((counts, source) => {
      const share = counts[place] / count;
      document.querySelector(`[data-count="${source}"]`).textContent = counts[place].toLocaleString("en");
      document.querySelector(`[data-share="${source}"]`).textContent = percent(share);
      parts[source].setAttribute("x", left);
      parts[source].setAttribute("width", share * width);
      left += share * width;
    });
  };
  const nearest = (wanted) => data.count.reduce(
    (best, count, place) => (Math.abs(count - wanted) < Math.abs(data.count[best] - wanted) ? place : best), 0);

  slider.classList.remove("hidden");
  slider.addEventListener("input", () => {
    const place = Number(slider.value);
    budget.value = data.count[place];
    cut(place);
  });
  document.getElementById("recut").addEventListener("submit", (event) => {
    const parsed = /^\s*([\d.]+)\s*(%?)\s*$/.exec(budget.value);
    if (!parsed) return;  // the server says what is wrong
    event.preventDefault();
    const place = nearest(parsed[2] ? Number(parsed[1]) / 100 * data.samples : Number(parsed[1]));
    slider.value = place;
    budget.value = data.count[place];
    cut(place);
  });
})();

(() => {
  const map = document.getElementById("map");
  if (!map) return;
  const svg = map.querySelector("svg.plot");
  const output = document.getElementById("map-sample");
  const here = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  here.setAttribute("class", "here");
  here.setAttribute("r", 7);
  let points, near;

  const load = async () => {
    svg.removeEventListener("pointerenter", load);
    const answer = await fetch(map.dataset.points, {credentials: "same-origin"});
    if (answer.ok) points = await answer.json();
  };
  const find = (event) => {
    if (!points) return;
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const distance = (point) => (point[0] - x) ** 2 + (point[1] - y) ** 2;
    near = points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    here.setAttribute("cx", near[0]);
    here.setAttribute("cy", near[1]);
    if (!here.parentNode) svg.append(here);
    const link = document.createElement("a");
    link.href = map.dataset.sample + near[2];
    link.textContent = `Sample ${near[2].toLocaleString("en")}`;
    output.replaceChildren(link, ` with influence ${near[3] === null ? "none" : near[3].toPrecision(3)}`);
  };
  svg.addEventListener("pointerenter", load);
  svg.addEventListener("pointermove", find);
  svg.addEventListener("click", (event) => {
    find(event);
    if (near) location.assign(map.dataset.sample + near[2]);
  });
})();
