"""Looks and behaviour of report.html: one style sheet, one script, nothing fetched."""

from __future__ import annotations

from training.reporting.charts import ramp_css

# Okabe and Ito's colours, which survive colour blindness; darker or lighter where the paper asks for it
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6f76", "#8a5a2b")
_DARK = ("#4fb0f0", "#f4813f", "#2cc39a", "#e39ac5", "#f2b53c", "#a6daf7", "#a9b0b8", "#c99b6d")
PALETTE = len(_LIGHT)


def _colours(palette: tuple[str, ...]) -> str:
    return ";".join(f"--c{i}:{colour}" for i, colour in enumerate(palette))


CSS = (
    f":root{{color-scheme:light dark;--paper:#fff;--ink:#1a1d21;--soft:#5c6570;--line:#e4e7ea;--wash:#f5f6f8;"
    f"--good:#00704f;--bad:#b3410a;{_colours(_LIGHT)}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{--paper:#131518;--ink:#e7e9eb;--soft:#9aa3ad;--line:#2b3036;"
    f"--wash:#1b1e22;--good:#35c69d;--bad:#f58a4d;{_colours(_DARK)}}}}}\n"
    + "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(PALETTE))
    + f"\n.ramp i{{background:{ramp_css()}}}\n"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
 "Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
.page{max-width:1160px;margin:0 auto;padding:40px 32px 96px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;font-weight:650;margin:0;overflow-wrap:anywhere}
h2{font-size:20px;line-height:1.3;letter-spacing:-.01em;font-weight:650;margin:0 0 4px}
h3{font-size:15px;line-height:1.35;font-weight:600;margin:0}
h4{font-size:13px;font-weight:600;margin:28px 0 8px;color:var(--soft)}
p{margin:0}
a{color:var(--c0);text-decoration:none}
a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px;border-radius:2px}
.state{font-size:14px;color:var(--soft);margin-bottom:6px}
.state::before{content:"";display:inline-block;width:8px;height:8px;border-radius:50%;background:currentColor;
 margin-right:8px}
.state.running{color:var(--c0)}.state.finished{color:var(--good)}.state.failed,.state.silent{color:var(--bad)}
.lead{color:var(--soft);margin-top:6px;max-width:75ch}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(136px,1fr));gap:22px 24px;margin:30px 0 0}
.figures dt{font-size:13px;color:var(--soft)}
.figures dd{margin:0;font-size:23px;white-space:nowrap;line-height:1.25;font-weight:600;letter-spacing:-.015em}
.figures dd small{display:block;white-space:normal;font-size:12.5px;
 line-height:1.4;font-weight:400;letter-spacing:0;color:var(--soft)}
.progress{height:4px;border-radius:2px;background:var(--line);margin:26px 0 0;overflow:hidden}
.progress i{display:block;height:100%;background:var(--c0)}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:5px 20px;margin:26px 0 0;font-size:14px}
.facts dt{color:var(--soft)}.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
nav{margin:34px 0 0;padding:12px 0;border-top:1px solid var(--line);border-bottom:1px solid var(--line);font-size:14px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 22px;margin:0;padding:0;list-style:none}
section{margin-top:60px}
.say{color:var(--soft);max-width:75ch;margin-top:4px}
.missing{color:var(--soft);font-size:14px;margin-top:14px;padding-left:12px;border-left:2px solid var(--line);
 max-width:85ch}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:44px 48px;margin-top:28px}
.maps{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.charts:empty{display:none}
.chart{margin:0;min-width:0;display:flex;flex-direction:column}
figcaption{flex:1}
.chart.wide{grid-column:1/-1}
figcaption p{font-size:13px;line-height:1.4;color:var(--soft);min-height:1.4em}
.unit{font-weight:400;color:var(--soft);font-size:13px}
.legend{display:flex;flex-wrap:wrap;gap:0 18px;margin:4px 0 10px;padding:0;list-style:none;font-size:13px;
 color:var(--soft)}
.legend output{color:var(--ink);font-weight:600;margin-left:3px;display:inline-block;min-width:3.2em}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--c);margin-right:7px;
 vertical-align:middle}
.frame{display:grid;grid-template-columns:46px 1fr;grid-template-rows:190px 20px}
.wide .frame{grid-template-rows:280px 20px}
.heat .frame{grid-template-rows:170px 20px}
.y,.x,.plot{position:relative;min-width:0}
.y span,.x span{position:absolute}
.y span,.x span,.x-unit{font-size:11.5px;line-height:1;color:var(--soft);white-space:nowrap}
.x-unit{text-align:right;padding:7px 9px 0 0}
.y span{right:9px;transform:translateY(50%)}
.x span{top:7px;transform:translateX(-50%)}
.x span.end{transform:translateX(-100%)}
.x span.begin{transform:none}
.plot{border-bottom:1px solid var(--line);touch-action:pan-y}
.plot svg{position:absolute;inset:0;width:100%;height:100%;display:block}
.plot path{vector-effect:non-scaling-stroke;fill:none}
.plot .grid{stroke:var(--line);stroke-width:1}
.plot .line{stroke:var(--c);stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}
.plot .lone{stroke-width:6}
.plot .band{fill:var(--c);opacity:.2}
.plot .band.many{opacity:.11}
.plot .level{stroke:var(--soft);stroke-width:1;stroke-dasharray:5 4}
.plot .vertical{stroke:var(--soft);stroke-width:1;stroke-dasharray:1 3}
.plot .dots{stroke:var(--c1);stroke-width:6;stroke-linecap:round}
.plot image{image-rendering:pixelated}
.heat .plot{border:0;background:var(--wash)}
.of-level{position:absolute;right:4px;transform:translateY(-3px);font-size:11.5px;line-height:1;color:var(--soft);
 background:var(--paper);padding:1px 3px;border-radius:2px}
.rule{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);display:none;pointer-events:none}
.rule b{position:absolute;top:0;left:5px;padding:1px 4px;border-radius:3px;background:var(--paper);font-size:11.5px;
 font-weight:500;line-height:1.4;white-space:nowrap}
.rule.late b{left:auto;right:5px}
.ramp{display:flex;align-items:center;gap:8px;font-size:12px;color:var(--soft);margin:4px 0 10px}
.ramp i{width:96px;height:6px;border-radius:3px}
.bar{display:flex;height:30px;gap:2px;margin:20px 0 6px;border-radius:4px;overflow:hidden}
.bar i{display:block;min-width:2px;background:var(--c);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.bar-row{margin-top:18px}
.bar-row .bar{height:22px;margin:6px 0 0}
.swatch{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);margin-right:9px;
 vertical-align:-1px}
.keys{columns:3 300px;column-gap:48px;font-size:13.5px;margin:12px 0 0}
.keys div{display:flex;gap:10px;align-items:baseline;padding:4px 0;border-bottom:1px solid var(--line);
 break-inside:avoid}
.keys dt{flex:1;min-width:0;overflow-wrap:anywhere}
.keys dd{margin:0;text-align:right;max-width:65%}
.keys dd s{display:inline-block;text-decoration:none;color:var(--soft);margin-left:10px}
.keys .same{color:var(--soft)}
.scroll{overflow-x:auto;margin-top:16px}
table{border-collapse:collapse;width:100%;font-size:14px;margin-top:16px}
.scroll table{margin-top:0;width:auto;min-width:min(100%,560px)}
caption{text-align:left;font-size:13px;color:var(--soft);padding-bottom:6px}
th,td{text-align:left;vertical-align:top;padding:7px 18px 7px 0;border-bottom:1px solid var(--line);
 overflow-wrap:anywhere}
th:last-child,td:last-child{padding-right:0}
thead th{font-weight:500;color:var(--soft);font-size:13px;white-space:nowrap}
tbody th{font-weight:500}
.n{text-align:right;white-space:nowrap}
.short,tbody th{white-space:nowrap}
.scroll tbody th{white-space:normal}
.scroll td,.scroll th{overflow-wrap:normal}
.scroll tbody th{position:sticky;left:0;background:var(--paper);max-width:45vw}
td.good{color:var(--good)}td.bad{color:var(--bad)}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12.5px}
pre{background:var(--wash);padding:14px 16px;border-radius:6px;overflow-x:auto;line-height:1.5;margin:12px 0 0;
 white-space:pre-wrap;overflow-wrap:anywhere}
details{margin-top:16px}
summary{cursor:pointer;color:var(--c0);font-size:14px;width:max-content;max-width:100%}
.verdicts{margin:18px 0 0;padding:0;list-style:none;counter-reset:v}
.verdicts li{padding:0 0 18px;max-width:85ch}
.verdicts .gain{color:var(--c0);font-weight:600;font-size:14px;margin-left:6px;white-space:nowrap}
.verdicts p{margin-top:3px}
.verdicts .turn{padding-left:14px;border-left:2px solid var(--c0);margin-top:8px;overflow-wrap:anywhere}
.soft{color:var(--soft)}.small{font-size:13px;overflow-wrap:anywhere}
.sample{margin-top:26px;max-width:75ch}
.sample .text{white-space:pre-wrap;overflow-wrap:anywhere;margin-top:3px}
.sample .prompt{color:var(--soft)}
.run{margin-top:26px}.run>h3{border-top:1px solid var(--line);padding-top:14px}
footer{margin-top:72px;padding-top:16px;border-top:1px solid var(--line);font-size:13px;color:var(--soft)}
@media (max-width:640px){
 .page{padding:24px 16px 64px}
 h1{font-size:25px}
 section{margin-top:48px}
 .figures{grid-template-columns:1fr 1fr;gap:18px 16px;margin-top:24px}
 .figures dd{font-size:21px}
 .facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:9px}
 .wide .frame{grid-template-rows:220px 20px}
 .frame{grid-template-columns:40px 1fr}
 table.stack,.stack tbody,.stack tr,.stack td,.stack th{display:block}
 .stack thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
 .stack tr{padding:10px 0;border-bottom:1px solid var(--line)}
 .stack td,.stack tbody th{border:0;padding:1px 0 1px 116px;text-align:left;white-space:normal;position:relative;
  min-height:1.5em}
 .stack tbody th{padding-left:0;font-weight:600}
 .stack .bare::before{content:attr(data-name) " "}
 .stack td::before{content:attr(data-name);position:absolute;left:0;width:108px;color:var(--soft);font-size:13px}
 .budget tr{display:grid;grid-template-columns:1fr auto 62px;gap:0 12px}
 .budget td:not(:last-child),.budget td:last-child{padding:1px 0;text-align:right}
 .budget td:last-child{grid-column:1/-1;text-align:left;color:var(--soft);font-size:13px}
 .budget td::before{content:none}
}
@media print{nav,summary{display:none}section{break-inside:avoid-page}}
"""
)

# Under a pointer, the legend tells the values there; when it leaves, the newest again.
SCRIPT = """
"use strict";
const say = v => v === 0 || Math.abs(v) >= 1e-3
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
      outputs[i].textContent = inside ? say(ys[nearest(xs, x)]) : "\\u2013";
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
"""
