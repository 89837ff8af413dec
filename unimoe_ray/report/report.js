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
