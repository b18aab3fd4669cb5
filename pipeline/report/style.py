"""How the evidence card looks: one sheet for screens light and dark, wide and narrow, and for paper."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f4f5f7; --line: #d3d7dd; --ink: #1a1d21; --quiet: #525a65;
  --good: #17733a; --bad: #b3261e; --warn: #7d5000; --same: #8b939d; --blue: #1d5fbf; --on: #ffffff;
  --noise: #e2e5ea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --panel: #1e2226; --line: #3a4149; --ink: #e8eaed; --quiet: #abb3bd;
    --good: #5cc97c; --bad: #ff8f85; --warn: #f0b849; --same: #7b848e; --blue: #82b1ff; --on: #14171a;
    --noise: #2b3138;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; margin: .6rem 0 1rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
section { margin-top: 2rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
p { margin: 0 0 .75rem; max-width: 46rem; }
.lead, .note, caption, figcaption { color: var(--quiet); font-size: .9rem; }
.which { display: flex; flex-wrap: wrap; gap: .5rem .9rem; align-items: center; color: var(--quiet); margin: 0; }
.badge {
  display: inline-block; padding: .2rem .75rem; border-radius: 1rem; font-weight: 650; color: var(--on);
  background: var(--warn);
}
.promoted .badge { background: var(--good); }
.worse .badge, .guard_failed .badge, .contaminated .badge { background: var(--bad); }
.answer { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 2rem; }
.answer h2 { font-size: 1rem; }
.answer ul { margin: 0 0 1rem; padding-left: 1.15rem; }
.answer li { margin-bottom: .45rem; }
.big { display: flex; flex-wrap: wrap; gap: .75rem; margin: .5rem 0 1rem; }
.big > div { flex: 1 1 8rem; background: var(--panel); border-radius: .5rem; padding: .6rem .9rem; }
.big dt { color: var(--quiet); font-size: .85rem; }
.big dd { margin: 0; font-size: 1.5rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.big small { display: block; font-size: .8rem; font-weight: 400; color: var(--quiet); }
figure { margin: 1rem 0 1.5rem; }
figcaption { margin-top: .4rem; }
.legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .4rem 0 0; font-size: .9rem;
}
code, pre, .code { font: .875em/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { background: var(--panel); border-radius: .25rem; padding: .1rem .3rem; }
.command { display: block; width: fit-content; max-width: 100%; margin-top: .2rem; }
pre {
  white-space: pre-wrap; background: var(--panel); border-radius: .4rem; padding: .6rem .75rem; margin: .25rem 0 .75rem;
  unicode-bidi: plaintext; text-align: start;
}
td small { display: block; color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: left; padding: .4rem .6rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 11rem; }
.number { text-align: right; white-space: nowrap; }
td:has(> svg.row) { width: 26%; min-width: 9rem; }
.state { white-space: nowrap; font-weight: 600; }
.state.failed { color: var(--bad); }
.state.passed { color: var(--good); }
.state.shown { color: var(--quiet); font-weight: 400; }
.state.nearly { color: var(--warn); }
dl {
  display: grid; grid-template-columns: minmax(9rem, 24rem) 1fr; gap: .3rem 1.2rem; margin: .5rem 0 1rem;
  font-size: .94rem;
}
dt { color: var(--quiet); }
dd { margin: 0; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; padding: 0 .9rem; }
summary { cursor: pointer; padding: .55rem 0; }
summary .preview {
  display: block; color: var(--quiet); font-size: .9rem; overflow: hidden; white-space: nowrap; text-overflow: ellipsis;
}
summary:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
details[open] > summary { border-bottom: 1px solid var(--line); margin-bottom: .75rem; }
.delta { font-weight: 650; font-variant-numeric: tabular-nums; }
.delta.bad { color: var(--bad); }
.delta.good { color: var(--good); }
.warning { border-left: 4px solid var(--warn); padding-left: .75rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 1.5rem; }
.label { margin: 0; color: var(--quiet); font-size: .88rem; }
svg { display: block; overflow: hidden; }
svg.swatch { display: inline-block; margin-right: .35rem; vertical-align: -1px; }
svg text { font: 12px system-ui, "Noto Sans", Arial, sans-serif; text-anchor: middle; fill: var(--ink); }
svg text.quiet { fill: var(--quiet); }
svg text.strong { font-size: 15px; font-weight: 650; paint-order: stroke; stroke: var(--page); stroke-width: 5px; }
svg text.end { text-anchor: end; }
svg line { stroke: var(--quiet); stroke-width: 1; }
svg line.axis, svg line.rung { stroke: var(--line); }
svg line.zero { stroke: var(--ink); stroke-width: 1.5; }
svg line.needed { stroke: var(--good); stroke-width: 2; stroke-dasharray: 6 4; }
svg line.seen { stroke: var(--warn); stroke-width: 2; stroke-dasharray: 2 3; }
svg line.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 3 2; }
svg line.span { stroke: var(--blue); stroke-width: 3; }
svg circle.gain { fill: var(--blue); }
svg circle.dev { fill: var(--warn); }
svg .good { fill: var(--good); }
svg .bad { fill: var(--bad); }
svg .warn { fill: var(--warn); }
svg .same, svg .plain { fill: var(--same); }
svg .noise { fill: var(--noise); stroke: var(--noise); }
svg line.noise { stroke-width: 10; }
svg polyline, svg line.trained, svg line.dev { fill: none; stroke: var(--blue); stroke-width: 2; }
svg polyline.dev, svg line.dev { stroke: var(--warn); stroke-dasharray: 6 3; }
svg.bar { border-radius: .35rem; }
@media (max-width: 46rem) {
  body { padding: 1rem .9rem 3rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, caption, tbody, tr, tbody th, td { display: block; }
  tr { border: 1px solid var(--line); border-radius: .5rem; margin-bottom: .6rem; padding: .5rem .75rem; }
  tbody th { min-width: 0; }
  tbody th, td, td:has(> svg.row) { border: 0; padding: .12rem 0; width: auto; text-align: left; white-space: normal; }
  td.number { text-align: left; white-space: normal; }
  td:empty { display: none; }
  td[data-label] { display: grid; grid-template-columns: minmax(6rem, 35%) 1fr; gap: 0 .75rem; align-items: center; }
  td[data-label] > small { grid-column: 2; }
  td[data-label]::before { content: attr(data-label); color: var(--quiet); font-weight: 400; }
  dl:not(.big) { grid-template-columns: 1fr; gap: 0; }
  dl:not(.big) dd { margin-bottom: .5rem; }
  .big > div { flex-basis: 6.5rem; }
}
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  section { margin-top: 1rem; padding-top: .75rem; }
  figure, tr, .big > div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  * { print-color-adjust: exact; }
}
"""
