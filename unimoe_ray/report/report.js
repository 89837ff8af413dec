// Reads a value off a loss chart: with the pointer, or with the arrow keys once the chart has the focus.
for (const figure of document.querySelectorAll("figure.chart")) {
  const points = JSON.parse(figure.dataset.points);
  const readout = figure.querySelector(".readout");
  const [left, right, top, bottom] = [42, 10, 10, 26];
  const summary = readout.textContent;
  let index = points.length - 1;

  const show = (svg) => {
    const [x0, x1, y0, y1, log] = JSON.parse(svg.dataset.axes);
    const { width, height } = svg.viewBox.baseVal;
    const [step, loss, smooth] = points[index];
    const x = left + ((step - x0) / (x1 - x0)) * (width - left - right);
    const share = log ? Math.log(smooth / y0) / Math.log(y1 / y0) : (smooth - y0) / (y1 - y0);
    const y = height - bottom - share * (height - top - bottom);
    const cross = svg.querySelector(".cross"), mark = svg.querySelector(".mark");
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    mark.setAttribute("cx", x);
    mark.setAttribute("cy", y);
    for (const part of [cross, mark]) part.setAttribute("visibility", "visible");
    readout.textContent = `step ${step}: ${loss}, smoothed ${smooth}`;
  };
  const hide = (svg) => {
    for (const part of svg.querySelectorAll(".cross, .mark")) part.setAttribute("visibility", "hidden");
    readout.textContent = summary;
  };
  for (const svg of figure.querySelectorAll("svg")) {
    svg.addEventListener("pointermove", (event) => {
      const [x0, x1] = JSON.parse(svg.dataset.axes);
      const box = svg.getBoundingClientRect();
      const width = svg.viewBox.baseVal.width;
      const at = ((event.clientX - box.left) / box.width) * width;
      const step = x0 + ((at - left) / (width - left - right)) * (x1 - x0);
      const distance = (i) => Math.abs(points[i][0] - step);
      index = points.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0);
      show(svg);
    });
    svg.addEventListener("pointerleave", () => hide(svg));
    svg.addEventListener("focus", () => show(svg));
    svg.addEventListener("blur", () => hide(svg));
    svg.addEventListener("keydown", (event) => {
      const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -points.length, End: points.length };
      if (!(event.key in jump)) return;
      event.preventDefault();
      index = Math.min(points.length - 1, Math.max(0, index + jump[event.key]));
      show(svg);
    });
  }
}

// Reads columns off strips and line charts: with the pointer, or with the arrow keys.
const columns = (figure, count, at, show) => {
  const svg = figure.querySelector("svg");
  const readout = figure.querySelector(".readout");
  const summary = readout.textContent;
  let index = count - 1;
  const move = (to) => {
    index = Math.min(count - 1, Math.max(0, to));
    readout.textContent = show(svg, index);
  };
  const hide = () => {
    for (const part of svg.querySelectorAll(".cross, .cursor")) part.setAttribute("visibility", "hidden");
    readout.textContent = summary;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    move(at((event.clientX - box.left) / box.width));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("focus", () => move(index));
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -count, End: count };
    if (!(event.key in jump)) return;
    event.preventDefault();
    move(index + jump[event.key]);
  });
};
for (const figure of document.querySelectorAll("figure.strip")) {
  const { rows, spans, shares } = JSON.parse(figure.dataset.strip);
  columns(figure, spans.length, (share) => Math.floor(share * spans.length), (svg, index) => {
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x", index);
    cursor.setAttribute("visibility", "visible");
    const [first, last] = spans[index];
    const values = rows.map((row, i) => `${row} ${shares[i][index] ?? "–"}`);
    const shown = values.length <= 8 ? values.join(", ") : "";
    return `${first === last ? "step" : "steps"} ${first === last ? first : `${first}–${last}`}: ${shown}`;
  });
}
for (const figure of document.querySelectorAll("figure.lines")) {
  const { steps, names, values, x } = JSON.parse(figure.dataset.lines);
  const width = figure.querySelector("svg").viewBox.baseVal.width;
  const nearest = (share) => x.reduce((best, place, i) =>
    Math.abs(place - share * width) < Math.abs(x[best] - share * width) ? i : best, 0);
  columns(figure, steps.length, nearest, (svg, index) => {
    const cross = svg.querySelector(".cross");
    cross.setAttribute("x1", x[index]);
    cross.setAttribute("x2", x[index]);
    cross.setAttribute("visibility", "visible");
    return `step ${steps[index]}: ${names.map((name, i) => `${name} ${values[i][index] ?? "–"}`).join(", ")}`;
  });
}
