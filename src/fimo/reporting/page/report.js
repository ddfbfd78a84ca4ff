"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const settings = { responsive: true, displayModeBar: false };
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Figures come without colours of their own for text and grid: those follow the page.
  function themed(layout) {
    const themed = structuredClone(layout);
    themed.font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--text") };
    themed.hoverlabel = { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--text") } };
    for (const axis of new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis/.test(key))])) {
      themed[axis] = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"), ...(themed[axis] || {}) };
    }
    themed.autosize = true;
    return themed;
  }

  // On a phone panels stand below each other, and the legend below them.
  function narrowed(layout, element) {
    const panels = layout.meta?.panels || 1;
    const narrow = element.clientWidth < 620;
    element.style.height = "";
    if (!narrow) return layout;
    const legend = layout.showlegend !== false && !layout.legend?.orientation;
    const names = element.closest(".pair") ? 0 : 1;
    const height = 300 * panels + (legend && names ? 170 : 0);
    if (panels > 1 || (legend && names)) element.style.height = `${height}px`;
    const inner = height - 90 - (legend && names ? 150 : 0);
    if (legend) layout.legend = { ...layout.legend, orientation: "h", x: 0, y: -56 / Math.max(inner, 1), yanchor: "top", font: { size: 11 } };
    layout.margin = { ...layout.margin, l: 48, r: 8 };
    for (let k = 0; panels > 1 && k < panels; k++) {
      const id = k ? String(k + 1) : "";
      const top = 1 - k / panels;
      const bottom = 1 - (k + 1) / panels + (k < panels - 1 ? 0.13 : 0);
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
    if (figure === "last") element.style.setProperty("--rows", layout.yaxis.categoryarray.length);
    Plotly.react(element, traces, narrowed(layout, element), settings);
  }

  const visible = (element) => element.offsetParent !== null;
  const drawAll = () => {
    document.querySelectorAll(".plot[data-figure]").forEach((e) => visible(e) && draw(e));
    document.querySelectorAll(".explorer").forEach((e) => visible(e) && explore(e));
  };

  document.querySelectorAll(".choice button").forEach((button) => {
    button.addEventListener("click", () => {
      const section = button.closest(".tab");
      const run = section.querySelector(".plot[data-run]").dataset.run;
      metric[run] = button.dataset.metric;
      section.querySelectorAll(".choice button").forEach((b) => b.setAttribute("aria-pressed", b === button));
      section.querySelectorAll(".plot[data-figure]").forEach((e) => visible(e) && draw(e));
    });
  });

  document.querySelectorAll(".tabs button").forEach((button) => {
    button.addEventListener("click", () => {
      document.querySelectorAll(".tabs button").forEach((b) => b.setAttribute("aria-selected", b === button));
      document.querySelectorAll(".tab").forEach((s) => (s.hidden = s.id !== button.dataset.tab));
      drawAll();
    });
  });

  // One test instance at a time
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const power = (exponent) => ` × 10${[...String(Number(exponent))].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("")}`;
  const number = (value, digits = 4) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    const [mantissa, exponent] = String(Number(value.toPrecision(digits))).split("e");
    return mantissa.replace("-", "\u2212") + (exponent ? power(exponent) : "");
  };
  const short = (display) => {
    if (!display) return "";
    const text = display.text ? ` \u201c${display.text.slice(0, 50)}${display.text.length > 50 ? "…" : ""}\u201d` : "";
    return `${text} target ${number(display.target)}`;
  };

  function showInstance(box, test) {
    box.replaceChildren(make("b", `test instance ${test.name}`));
    const display = test.display;
    if (!display) return;
    if (display.image) {
      const image = make("img");
      image.src = display.image;
      image.alt = "the test instance";
      box.append(make("br"), image);
    }
    if (display.text) box.append(make("p", display.text));
    const list = make("dl");
    const entries = [["target", display.target]];
    if (display.prediction !== undefined) entries.push(["model says", display.prediction]);
    if (display.loss !== undefined) entries.push(["loss", display.loss]);
    for (const [key, value] of [...entries, ...Object.entries(display.row || {})]) {
      const pair = make("div", null, "pairing");
      pair.append(make("dt", key), make("dd", number(value)));
      list.append(pair);
    }
    box.append(list);
  }

  function rowsTable(rows, train, kind, noun) {
    if (!rows.length) return make("p", "None.", "quiet");
    const displays = rows.map((row) => train[row.index]);
    const columns = [...new Set(displays.flatMap((d) => Object.keys((d && d.row) || {})))];
    const content = !columns.length || displays.some((d) => d && (d.text || d.image));
    const seeds = rows[0].seeds > 1 && rows[0].error !== null;
    const says = displays.some((d) => d && d.prediction !== undefined);
    const exponent = Math.floor(Math.log10(Math.max(...rows.map((row) => Math.abs(row.effect)))));
    const size = exponent >= -1 && exponent <= 3 ? 1 : 10 ** exponent;
    const fixed = (value) => (size === 1 ? number(value, 3) : (value / size).toFixed(2).replace("-", "\u2212"));
    const table = make("table", null, `rows ${kind}`);
    const head = make("tr");
    const titles = [`training ${noun}`, `effect on its loss${size === 1 ? "" : ` (${power(exponent).trim()})`}`, ...(seeds ? ["seeds"] : []), "target", ...(says ? ["model says"] : []), ...(content ? ["instance"] : []), ...columns];
    titles.forEach((title, i) => head.append(make("th", title, i === 1 || columns.includes(title) ? "number" : "")));
    const body = make("tbody");
    rows.forEach((row, i) => {
      const tr = make("tr", null, row.error !== null && Math.abs(row.effect) <= 2 * row.error ? "unclear" : "");
      tr.append(make("td", row.name, "id"));
      const effect = make("td", null, "number");
      effect.append(make("b", (row.effect > 0 ? "+" : "") + fixed(row.effect)));
      if (row.error !== null) effect.append(make("span", ` ± ${fixed(row.error)}`, "quiet"));
      tr.append(effect);
      if (seeds) tr.append(make("td", `${row.seeds_agreeing}/${row.seeds}`));
      const display = displays[i];
      tr.append(make("td", number(display && display.target)));
      if (says) tr.append(make("td", number(display && display.prediction)));
      if (content && display && display.image) {
        const image = make("img", null, "instance");
        image.src = display.image;
        image.alt = "training instance";
        const cell = make("td");
        cell.append(image);
        tr.append(cell);
      } else if (content) tr.append(make("td", display ? display.text : "not kept", "sentence"));
      columns.forEach((c) => tr.append(make("td", number(display && display.row && display.row[c]), "number")));
      body.append(tr);
    });
    const thead = make("thead");
    thead.append(head);
    table.append(thead, body);
    return table;
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
    showInstance(element.querySelector(".instance-shown"), test);
    const base = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 64, r: 12, t: 30, b: 48 }, hovermode: "closest" };
    const legend = { orientation: "h", x: 0, y: 1.12 };
    const good = css("--good"), bad = css("--bad"), accent = css("--accent");
    Plotly.react(element.querySelector(".plot-sorted"), [
      { type: "bar", x: rank, y: sensitivity, text: ids, textposition: "none", name: "sensitivity", marker: { color: sensitivity.map((v) => (v > 0 ? good : bad)), opacity: 0.55 }, hovertemplate: "%{text}<br>%{y:.3g}<extra>sensitivity</extra>" },
      { type: "scatter", mode: "markers", x: rank, y: scores.map((v) => (v === null ? null : v * factor)), customdata: scores, text: ids, name: `${method}, scaled`, marker: { color: accent, size: 6 }, hovertemplate: "%{text}<br>score %{customdata:.3g}<extra></extra>" },
    ], themed({ ...base, legend, bargap: 0, xaxis: { title: { text: `left-out training ${noun}s, sorted` }, zeroline: false }, yaxis: { title: { text: "change of this test loss" }, exponentformat: "power", automargin: true } }), settings);
    Plotly.react(element.querySelector(".plot-scatter"), [
      { type: "scatter", mode: "markers", x: scores, y: sensitivity, error_x: errors ? { type: "data", array: errors, thickness: 1, width: 0 } : undefined, text: ids, marker: { color: accent, size: 7, opacity: 0.7 }, hovertemplate: "%{text}<br>score %{x:.3g}<br>sensitivity %{y:.3g}<extra></extra>" },
    ], themed({ ...base, title: { text: `${source.metric} ${number(test.agreement[method], 3)}`, font: { size: 14 }, x: 0.5, y: 0.97 }, xaxis: { title: { text: `score by ${method}` }, exponentformat: "power", automargin: true }, yaxis: { title: { text: "sensitivity" }, exponentformat: "power", automargin: true } }), settings);
    element.querySelector(".helpful-rows").replaceChildren(rowsTable(test.helpful, source.train, "helpful", noun));
    element.querySelector(".harmful-rows").replaceChildren(rowsTable(test.harmful, source.train, "harmful", noun));
  }

  document.querySelectorAll("details").forEach((d) => d.addEventListener("toggle", drawAll));
  dark.addEventListener("change", drawAll);
  drawAll();
})();
