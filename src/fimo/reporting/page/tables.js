// Tables that are sorted, searched and downloaded: data from the page's JSON, rows drawn as far as they are shown.
const lead = (value) => (Array.isArray(value) ? value[0] : value); // an effect's value, without its error
const words = (value) => (value === null || value === undefined ? "" : typeof value === "object" && !Array.isArray(value) ? value.text || "" : String(lead(value)));

const paired = (column) => ["effect", "agreement"].includes(column.kind); // with its standard error
const numeric = (column) => ["effect", "agreement", "number", "value", "q"].includes(column.kind);

function compare(a, b, descending) {
  const [x, y] = [lead(a), lead(b)];
  const [noX, noY] = [x === null || x === undefined || x === "", y === null || y === undefined || y === ""];
  if (noX || noY) return noX - noY; // what is absent comes last either way
  const order = typeof x === "number" && typeof y === "number" ? x - y : words(a).localeCompare(words(b), undefined, { numeric: true });
  return descending ? -order : order;
}

function csvOf(table, rows) {
  const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const head = table.columns.flatMap((c) => (paired(c) ? [c.label, `${c.label}, standard error`] : [c.label]));
  const cells = (row) => row.flatMap((value, k) => (paired(table.columns[k]) ? [value?.[0] ?? "", value?.[1] ?? ""] : [words(value)]));
  return [head, ...rows.map(cells)].map((line) => line.map((value) => quoted(String(value))).join(",")).join("\r\n");
}

function download(name, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", text], { type: "text/csv" })); // the mark tells spreadsheets that it is UTF-8
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// A power of ten that a column of small numbers shares, and decimals that show its errors.
function unitOf(values, errors) {
  const most = Math.max(0, ...values.map(Math.abs).filter(Number.isFinite));
  const exponent = most > 0 ? Math.floor(Math.log10(most)) : 0;
  const plainly = exponent >= 0 && exponent <= 4;
  const size = plainly ? 1 : 10 ** exponent;
  const least = Math.min(...errors.filter((e) => e > 0)) / size;
  return { size, label: plainly ? "" : power(exponent).trim(), digits: plainly && exponent > 1 ? 0 : least < 0.01 ? 3 : 2 };
}

function dataTable(box, table) {
  const { columns, rows } = table;
  const step = table.shown || 15;
  const state = { sort: table.sort ?? -1, descending: table.descending ?? true, shown: step, text: "", verdict: "" };
  const units = columns.map((c, k) => (c.kind === "effect" ? unitOf(rows.map((r) => r[k]?.[0] ?? 0), rows.map((r) => r[k]?.[1] ?? 0)) : null));
  const haystack = rows.map((row) => row.map(words).join("\u0000").toLowerCase());
  const verdict = columns.findIndex((c) => c.kind === "verdict");

  const bar = make("div", null, "tools");
  const search = make("input");
  search.type = "search";
  search.placeholder = "search";
  search.setAttribute("aria-label", "search the table");
  const count = make("span", null, "quiet count");
  const save = make("button", "download CSV", "plain");
  save.type = "button";
  const choose = make("select");
  choose.setAttribute("aria-label", "verdict");
  choose.add(new Option("all verdicts", ""));
  [...new Set(rows.map((r) => r[verdict]).filter(Boolean))].sort().forEach((v) => choose.add(new Option(v, v)));
  if (rows.length > 10) bar.append(search, ...(verdict >= 0 && choose.options.length > 2 ? [choose] : []), count);
  bar.append(save);

  const scroll = make("div", null, "scroll");
  const element = make("table", null, "rows");
  const head = make("tr");
  const heads = columns.map((c, k) => {
    const th = make("th", null, numeric(c) ? "number" : "");
    const button = make("button", c.label, "sorter");
    if (units[k]?.label) button.append(" ", make("span", `(${units[k].label})`, "unit"));
    button.type = "button";
    if (c.hint) button.title = c.hint;
    button.addEventListener("click", () => {
      state.descending = state.sort === k ? !state.descending : numeric(c) && c.kind !== "q";
      state.sort = k;
      draw();
    });
    th.append(button);
    head.append(th);
    return th;
  });
  const thead = make("thead");
  thead.append(head);
  const body = make("tbody");
  element.append(thead, body);
  scroll.append(element);
  const more = make("p", null, "more");
  box.replaceChildren(bar, scroll, more);

  function cell(value, k) {
    const { kind } = columns[k];
    if (kind === "name") return make("td", words(value), "id");
    if (kind === "method") {
      const td = make("td", null, "id");
      const dot = make("span", null, "dot");
      dot.style.background = value.color;
      td.append(dot, value.text);
      return td;
    }
    if (kind === "agreement") {
      const td = make("td", null, "number");
      const fixed = (v) => v.toFixed(3).replace("-", "\u2212");
      if (value && value[0] !== null) td.append(make("b", fixed(value[0])));
      if (value && value[1] !== null) td.append(make("span", ` ± ${fixed(value[1])}`, "quiet"));
      return td;
    }
    if (kind === "verdict") return make("td", value || "", value === "helpful" ? "good" : value === "harmful" ? "bad" : "quiet");
    if (kind === "q") return make("td", value === null ? "" : value < 0.001 ? "< 0.001" : value.toFixed(3), "number");
    if (kind === "value") return make("td", value === null ? "" : number(value, 7), "number");
    if (kind === "number") return make("td", value === null ? "" : number(value, 3), "number");
    if (kind === "effect") {
      const td = make("td", null, "number");
      if (!value) return td;
      const fixed = (v) => (v / units[k].size).toFixed(units[k].digits).replace("-", "\u2212");
      td.append(make("b", (value[0] > 0 ? "+" : "") + fixed(value[0])));
      if (value[1] !== null) td.append(make("span", ` ± ${fixed(value[1])}`, "quiet"));
      return td;
    }
    if (kind === "instance") {
      const td = make("td", null, "sentence");
      if (value?.tokens) {
        const clamp = make("div", null, "clamp");
        clamp.append(tokenText(value));
        td.append(clamp);
      } else if (value?.text) td.append(make("div", value.text, "clamp"));
      if (value?.image) td.append(picture(value.image, "instance"));
      return td;
    }
    const text = value === null ? "" : number(value, 7);
    if (text.length <= 40) return make("td", text);
    const td = make("td", null, "sentence");
    td.append(make("div", text, "clamp"));
    return td;
  }

  function found() {
    const kept = rows.map((_, i) => i).filter((i) => haystack[i].includes(state.text) && (!state.verdict || rows[i][verdict] === state.verdict));
    if (state.sort >= 0) kept.sort((a, b) => compare(rows[a][state.sort], rows[b][state.sort], state.descending));
    return kept;
  }

  function draw() {
    const kept = found();
    heads.forEach((th, k) => th.setAttribute("aria-sort", k !== state.sort ? "none" : state.descending ? "descending" : "ascending"));
    body.replaceChildren(
      ...kept.slice(0, state.shown).map((i) => {
        const tr = make("tr", null, verdict >= 0 && rows[i][verdict] === "unclear" ? "unclear" : "");
        tr.append(...rows[i].map(cell));
        return tr;
      }),
    );
    count.textContent = kept.length === rows.length ? `${rows.length.toLocaleString("en")} in all` : `${kept.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    const rest = kept.length - state.shown;
    more.replaceChildren(...(rest > 0 ? [[`show ${Math.min(rest, 50)} more`, state.shown + 50], ...(rest > 50 ? [[`show all ${kept.length.toLocaleString("en")}`, kept.length]] : [])] : []).map(([text, shown]) => {
      const button = make("button", text, "plain");
      button.type = "button";
      button.addEventListener("click", () => { state.shown = shown; draw(); });
      return button;
    }));
  }

  search.addEventListener("input", () => { state.text = search.value.trim().toLowerCase(); state.shown = step; draw(); });
  choose.addEventListener("change", () => { state.verdict = choose.value; state.shown = step; draw(); });
  save.addEventListener("click", () => download(table.file, csvOf(table, found().map((i) => rows[i]))));
  draw();
  return {
    find(text) { search.value = text; search.dispatchEvent(new Event("input")); box.scrollIntoView({ block: "start" }); },
    sortBy(label) { state.sort = columns.findIndex((c) => c.label === label); state.descending = true; draw(); },
  };
}
