// Figures of runs, by the chosen measure of agreement.

// On a phone panels stand below each other, and the legend below them.
function narrowed(layout, element) {
  const panels = layout.meta?.panels || 1;
  const narrow = element.clientWidth < 620;
  const rows = layout.meta?.rowsOfPanels || 1;
  element.style.height = rows > 1 && !narrow ? `${60 + 330 * rows}px` : "";
  if (!narrow) return layout;
  const legend = layout.showlegend !== false && !layout.legend?.orientation;
  const names = element.closest(".pair") ? 0 : 1;
  const height = 300 * panels + (legend && names ? 170 : 0);
  if (panels > 1 || (legend && names)) element.style.height = `${height}px`;
  const inner = height - 90 - (legend && names ? 150 : 0);
  if (legend) layout.legend = { ...layout.legend, orientation: "h", x: 0, y: -56 / Math.max(inner, 1), yanchor: "top", font: { size: 11 } };
  layout.margin = { ...layout.margin, l: 48, r: 8 };
  const gap = 80 / inner; // for ticks, and the next panel's title
  const size = (1 - gap * (panels - 1)) / panels;
  for (let k = 0; panels > 1 && k < panels; k++) {
    const id = k ? String(k + 1) : "";
    const top = 1 - k * (size + gap);
    const bottom = Math.max(top - size, 0);
    layout[`xaxis${id}`] = { ...layout[`xaxis${id}`], domain: [0, 1] };
    layout[`yaxis${id}`] = { ...layout[`yaxis${id}`], domain: [bottom, top], showticklabels: true, title: layout.yaxis.title };
    if (k < panels - 1) layout[`xaxis${id}`].title = { text: "" };
    Object.assign(layout.annotations[k], { x: 0.5, y: top });
  }
  return layout;
}

const metric = {}; // chosen measure of agreement by run
const owner = (run) => (run === "comparison" ? data.comparison : data.runs[run].figures);

function draw(element) {
  const { run, figure } = element.dataset;
  const figures = owner(run)?.[figure];
  if (!figures) {
    element.closest("figure").hidden = true;
    return;
  }
  const chosen = figures[metric[run]] || figures[""] || Object.values(figures)[0];
  const hidden = new Set((element.data || []).filter((t) => t.visible === "legendonly").map((t) => t.legendgroup || t.name));
  const traces = chosen.data.map((t) => (hidden.has(t.legendgroup || t.name) ? { ...t, visible: "legendonly" } : t));
  const layout = themed(chosen.layout);
  if (element.closest(".pair") && run !== "comparison") layout.showlegend = false; // the large figure above has it
  const rows = layout.meta?.rows;
  element.classList.toggle("by-row", Boolean(rows));
  if (rows) element.style.setProperty("--rows", rows);
  Plotly.react(element, traces, narrowed(layout, element), settings);
}

drawings.push(() => document.querySelectorAll(".plot[data-figure]").forEach((e) => visible(e) && draw(e)));

document.querySelectorAll(".choice button").forEach((button) => {
  button.addEventListener("click", () => {
    const section = button.closest(".tab");
    const run = section.querySelector(".plot[data-run]").dataset.run;
    metric[run] = button.dataset.metric;
    section.querySelectorAll(".choice button").forEach((b) => b.setAttribute("aria-pressed", b === button));
    section.querySelectorAll(".plot[data-figure]").forEach((e) => visible(e) && draw(e));
  });
});
