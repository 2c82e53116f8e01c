// While the pointer is over a chart, its legend shows the values there; when it leaves, the newest values again.
"use strict";
const format = v => v === 0 || Math.abs(v) >= 1e-3
  ? v.toLocaleString("en", {maximumSignificantDigits: 4}) : v.toExponential(3);
for (const figure of document.querySelectorAll("figure[data-points]")) {
  const {x: [low, high], unit, s: curves} = JSON.parse(figure.dataset.points);
  const plot = figure.querySelector(".plot"), rule = figure.querySelector(".rule");
  const where = rule.querySelector("b"), outputs = [...figure.querySelectorAll("output")];
  const newest = outputs.map(output => output.textContent);
  const nearest = (xs, x) => {
    let a = 0, b = xs.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] > x) b = m; else a = m; }
    return x - xs[a] <= xs[b] - x ? a : b;
  };
  const show = event => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = low + share * (high - low);
    rule.style.left = 100 * share + "%";
    rule.style.display = "block";
    rule.classList.toggle("late", share > 0.6);
    where.textContent = unit + " " + Math.round(x).toLocaleString("en");
    curves.forEach(([xs, ys], i) => {
      const inside = x >= xs[0] - (high - low) / 50 && x <= xs[xs.length - 1] + (high - low) / 50;
      outputs[i].textContent = inside ? format(ys[nearest(xs, x)]) : "\u2013";
    });
  };
  const leave = () => {
    rule.style.display = "none";
    outputs.forEach((output, i) => output.textContent = newest[i]);
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("pointercancel", leave);
}
