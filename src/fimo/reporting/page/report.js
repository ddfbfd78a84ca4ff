drawings.push(() => document.querySelectorAll(".explorer").forEach((e) => visible(e) && explore(e)));

document.querySelectorAll(".tabs button").forEach((button) => {
  button.addEventListener("click", () => {
    document.querySelectorAll(".tabs button").forEach((b) => b.setAttribute("aria-selected", b === button));
    document.querySelectorAll(".tab").forEach((s) => (s.hidden = s.id !== button.dataset.tab));
    drawAll();
  });
});

// The measured rows
const tables = data.runs.map((run, r) => dataTable(document.querySelector(`.data[data-run="${r}"]`), run.rows));
data.runs.forEach((run, r) => dataTable(document.querySelector(`.data[data-methods="${r}"]`), run.methods));
document.querySelectorAll(".find").forEach((b) => b.addEventListener("click", () => tables[b.closest(".tab").id.slice(3)].find(b.dataset.find)));
document.querySelectorAll(".sort-by").forEach((b) => b.addEventListener("click", () => tables[b.dataset.table].sortBy(b.dataset.column)));

// One test instance at a time
const short = (display) => {
  if (!display) return "";
  const text = display.text ? ` \u201c${display.text.slice(0, 50)}${display.text.length > 50 ? "…" : ""}\u201d` : "";
  return `${text} target ${number(display.target)}`;
};

function showRows(box, rows, source, noun) {
  if (!rows.length) return box.replaceChildren(make("p", "None.", "quiet"));
  const displays = rows.map((row) => source.train[row.index] || {});
  const columns = [...new Set(displays.flatMap((d) => Object.keys(d.row || {})))];
  const content = displays.some((d) => d.text || d.image);
  const seeds = rows[0].seeds > 1 && rows[0].error !== null;
  const column = (label, kind, hint) => ({ label, kind, hint });
  dataTable(box, {
    file: "rows.csv",
    columns: [
      column(`training ${noun}`, "name"), column(`effect on its ${source.measured}`, "effect", "± standard error over seeds"),
      ...(seeds ? [column("seeds", "text", "in which the effect has this sign")] : []), column("target", "text"), column("model says", "text"),
      ...(content ? [column("instance", "instance")] : []),
      ...columns.map((c) => column(c, displays.some((d) => typeof d.row?.[c] === "string") ? "text" : "value")),
    ],
    rows: rows.map((row, i) => [
      row.name, [row.effect, row.error], ...(seeds ? [`${row.seeds_agreeing}/${row.seeds}`] : []), displays[i].target ?? null, displays[i].prediction ?? null,
      ...(content ? [displays[i]] : []), ...columns.map((c) => displays[i].row?.[c] ?? null),
    ]),
  });
}

const scale = (values) => Math.hypot(...values) || 1;

function explore(element) {
  const source = data.runs[element.dataset.run].explorer;
  const pickTest = element.querySelector(".pick-test");
  const pickMethod = element.querySelector(".pick-method");
  if (!pickTest.options.length) {
    source.tests.forEach((test, i) => pickTest.add(new Option(`${test.name}${short(test.display)}`, i)));
    source.methods.forEach((name) => pickMethod.add(new Option(name, name)));
    pickTest.addEventListener("change", () => explore(element));
    pickMethod.addEventListener("change", () => explore(element));
  }
  const noun = element.dataset.noun;
  const test = source.tests[pickTest.value];
  const method = pickMethod.value;
  const order = test.sensitivity.map((_, i) => i).sort((a, b) => test.sensitivity[b] - test.sensitivity[a]);
  const sensitivity = order.map((i) => test.sensitivity[i]);
  const scores = order.map((i) => test.scores[method][i]);
  const errors = test.errors[method] && order.map((i) => test.errors[method][i]);
  const factor = scale(sensitivity) / scale(scores.filter((v) => v !== null));
  const ids = order.map((i) => source.names[i]);
  const rank = order.map((_, i) => i + 1);
  const display = test.display || {};
  const facts = { target: display.target, "model says": display.prediction, loss: display.loss, ...display.row };
  showFacts(element.querySelector(".instance-shown"), `test instance ${test.name}`, display, facts);
  const base = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 64, r: 12, t: 30, b: 48 }, hovermode: "closest" };
  const legend = { orientation: "h", x: 0, y: 1.12 };
  const good = css("--good"), bad = css("--bad"), accent = css("--accent");
  Plotly.react(element.querySelector(".plot-sorted"), [
    { type: "bar", x: rank, y: sensitivity, text: ids, textposition: "none", name: "sensitivity", marker: { color: sensitivity.map((v) => (v * source.better > 0 ? good : bad)), opacity: 0.55 }, hovertemplate: "%{text}<br>%{y:.3g}<extra>sensitivity</extra>" },
    { type: "scatter", mode: "markers", x: rank, y: scores.map((v) => (v === null ? null : v * factor)), customdata: scores, text: ids, name: `${method}, scaled`, marker: { color: accent, size: 6 }, hovertemplate: "%{text}<br>score %{customdata:.3g}<extra></extra>" },
  ], themed({ ...base, legend, bargap: 0, xaxis: { title: { text: `left-out training ${noun}s, sorted` }, zeroline: false }, yaxis: { title: { text: `change of this test ${source.measured}` }, exponentformat: "power", automargin: true } }), settings);
  Plotly.react(element.querySelector(".plot-scatter"), [
    { type: "scatter", mode: "markers", x: scores, y: sensitivity, error_x: errors ? { type: "data", array: errors, thickness: 1, width: 0 } : undefined, text: ids, marker: { color: accent, size: 7, opacity: 0.7 }, hovertemplate: "%{text}<br>score %{x:.3g}<br>sensitivity %{y:.3g}<extra></extra>" },
  ], themed({ ...base, title: { text: `${source.metric} ${number(test.agreement[method], 3)}`, font: { size: 14 }, x: 0.5, y: 0.97 }, xaxis: { title: { text: `score by ${method}` }, exponentformat: "power", automargin: true }, yaxis: { title: { text: "sensitivity" }, exponentformat: "power", automargin: true } }), settings);
  showRows(element.querySelector(".helpful-rows"), test.helpful, source, noun);
  showRows(element.querySelector(".harmful-rows"), test.harmful, source, noun);
}

drawAll();
