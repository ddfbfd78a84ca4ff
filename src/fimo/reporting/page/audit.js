const tables = {};
document.querySelectorAll(".data[data-table]").forEach((box) => (tables[box.dataset.table] = dataTable(box, data.tables[box.dataset.table])));
document.querySelectorAll(".find").forEach((b) => b.addEventListener("click", () => tables.rows.find(b.dataset.find)));
document.querySelectorAll(".sort-by").forEach((b) => b.addEventListener("click", () => tables[b.dataset.table].sortBy(b.dataset.column)));

// Why this prediction? One named test instance at a time.
const why = document.querySelector(".why");
if (why) {
  const pick = make("select");
  data.tests.forEach((test, i) => pick.add(new Option(test.name, i)));
  const label = make("label", "test instance ");
  label.append(pick);
  const controls = make("p", null, "controls");
  controls.append(label);
  const shown = make("div", null, "instance-shown");
  const said = make("p");
  const box = make("div", null, "data");
  const together = make("div");
  why.append(controls, shown, said, together, make("h3", "Row by row"), box);
  const show = () => {
    const test = data.tests[pick.value];
    showFacts(shown, test.name, test.instance, test.facts);
    said.textContent = test.text;
    dataTable(box, test.table);
    together.replaceChildren();
    if (test.removals) {
      const inner = make("div", null, "data");
      together.append(make("h3", "Without its foremost rows together"), inner);
      dataTable(inner, test.removals);
    }
  };
  pick.addEventListener("change", show);
  show();
}

const plain = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", showlegend: false };

function drawCalibration(element) {
  const { name, verdict, score, score_sem, effect, effect_sem } = data.calibration;
  const colors = { helpful: css("--good"), harmful: css("--bad") };
  const ends = [Math.min(...score, ...effect), Math.max(...score, ...effect)];
  const bars = (array) => ({ type: "data", array, thickness: 1, width: 0, color: css("--line") });
  Plotly.react(element, [
    { x: ends, y: ends, mode: "lines", line: { dash: "dot", color: css("--quiet"), width: 1 }, hoverinfo: "skip" },
    { x: score, y: effect, error_x: bars(score_sem), error_y: bars(effect_sem), text: name, mode: "markers", marker: { size: 7, color: verdict.map((v) => colors[v] || css("--quiet")) }, hovertemplate: "%{text}<br>predicted %{x:.3g}<br>measured %{y:.3g}<extra></extra>" },
  ], themed({ ...plain, margin: { l: 70, r: 12, t: 12, b: 52 }, xaxis: { title: { text: "predicted effect" }, exponentformat: "power" }, yaxis: { title: { text: "measured effect" }, exponentformat: "power" } }), settings);
}

// Changes by the removal where they are known (their errors are those of differences), else what was measured.
function drawProof(element, found) {
  const changes = Boolean(found.change);
  const shown = found.removed.map((_, i) => i).filter((i) => !changes || found.rows[i] > 0);
  const take = (name) => shown.map((i) => found[name][i]);
  const [x, sem] = changes ? [take("change"), take("change_sem")] : [take("mean"), take("sem")];
  const names = shown.map((i) => `without ${found.removed[i]}${found.rows[i] ? ` (${found.rows[i]})` : ""}`);
  const means = shown.map((i) => [found.mean[i], found.seeds[i]]);
  Plotly.react(element, [
    { y: names, x, error_x: { type: "data", array: sem, thickness: 2, width: 6, color: css("--accent") }, customdata: means, mode: "markers", marker: { size: 9, color: css("--accent") }, hovertemplate: "%{y}<br>%{x:.4g}<br>itself %{customdata[0]:.4g}, %{customdata[1]} seeds<extra></extra>" },
  ], themed({ ...plain, margin: { l: 12, r: 16, t: 8, b: 48 }, xaxis: { title: { text: changes ? `change of the ${found.metric}` : found.metric }, zeroline: changes, zerolinewidth: 2 }, yaxis: { automargin: true, autorange: "reversed", type: "category" } }), settings);
}

const proofs = document.querySelector(".proof");
const proofPlots = (proofs ? data.proof : []).map((found) => {
  const plot = make("div", null, "plot");
  const figure = make("figure");
  figure.append(plot);
  proofs.append(figure);
  plot.style.height = `${70 + 44 * found.removed.length}px`;
  return [plot, found];
});

drawings.push(() => {
  document.querySelectorAll(".calibration").forEach((e) => visible(e) && drawCalibration(e));
  proofPlots.forEach(([plot, found]) => drawProof(plot, found));
});
drawAll();
