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
const picture = (address, name) => {
  const image = make("img", null, name);
  image.src = address;
  image.alt = "instance";
  return image;
};

// A sequence by its tokens, each coloured by its loss: what is predicted, after what is given.
function tokenText(instance) {
  const text = make("div", null, "tokens");
  const losses = instance.token_losses || [];
  instance.tokens.forEach((token, k) => {
    const loss = losses[k];
    const span = make("span", token, typeof loss === "number" ? "predicted" : "given");
    if (typeof loss === "number") {
      span.style.setProperty("--share", `${Math.round(60 * Math.min(1, loss / 8))}%`);
      span.title = `loss ${number(loss, 3)}, probability ${number(Math.exp(-loss), 2)}`;
    }
    text.append(span);
  });
  return text;
}

// An instance in full: its picture or text, then facts by name.
function showFacts(box, name, instance, facts) {
  box.replaceChildren(make("b", name));
  if (instance.image) box.append(make("br"), picture(instance.image, ""));
  if (instance.tokens) box.append(tokenText(instance), make("p", "Underlined tokens are predicted; the redder, the larger their loss.", "quiet small"));
  else if (instance.text) box.append(make("p", instance.text));
  const list = make("dl");
  for (const [key, value] of Object.entries(facts)) {
    if (value === undefined || value === null || value === "") continue;
    const pair = make("div", null, "pairing");
    pair.append(make("dt", key), make("dd", number(value)));
    list.append(pair);
  }
  box.append(list);
}

// What is drawn anew when it comes into sight, or the colours change.
const drawings = [];
const visible = (element) => element.offsetParent !== null;
const drawAll = () => drawings.forEach((redraw) => redraw());
let drawnAt = innerWidth;
addEventListener("resize", () => { // panels and legends have other places on a narrow page
  if (innerWidth === drawnAt) return;
  drawnAt = innerWidth;
  drawAll();
});
document.querySelectorAll("details").forEach((d) => d.addEventListener("toggle", drawAll));
dark.addEventListener("change", drawAll);

// A link to a folded section opens it.
const unfold = () => {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.closest("details")) target.closest("details").open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", unfold);
addEventListener("load", unfold);
