// The viewer's page: a list of slides, one of them on a deep zoom, one of its maps over it. What is seen stands in the address.

const byId = (id) => document.getElementById(id);
const run = await answer("api/run");
const rows = new Map(); // a slide's number -> its row of the table
const state = { slide: null, facts: null, stage: null, kind: null, overlay: true, opacity: 1, sort: "", descending: false };
let heat = null; // the map that is shown, as an image of the deep zoom
let asked = 0; // counts what was asked for, so that late answers to earlier questions are dropped

const viewer = OpenSeadragon({
  element: byId("viewer"),
  drawer: "canvas",
  showNavigationControl: false,
  showNavigator: true,
  navigatorPosition: "TOP_RIGHT",
  navigatorAutoFade: false,
  maxZoomPixelRatio: 4,
  visibilityRatio: 0.3,
  animationTime: 0.5,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  placeholderFillStyle: "#ffffff",
});

async function answer(address, options = {}) {
  const response = await fetch(address, options);
  const found = await response.json().catch(() => ({ problem: `the viewer answered ${response.status}` }));
  if (!response.ok) throw new Error(found.problem);
  return found;
}

function say(text, { problem = false } = {}) {
  byId("message").hidden = !text;
  byId("message").textContent = text;
  byId("message").classList.toggle("problem", problem);
}

// ---- the list

const probabilityOf = (slide) => (slide.probabilities ? slide.probabilities[slide.prediction] : null);

function outcomeOf(slide) {
  if (slide.prediction === null || slide.label === "") return "unscored";
  return slide.prediction === slide.label ? "right" : "wrong";
}

function cell(row, text, name = "") {
  const made = row.insertCell();
  made.textContent = text ?? "";
  made.className = name;
}

function fillRow(slide) {
  const row = document.createElement("tr");
  row.tabIndex = -1;
  row.classList.toggle("wrong", outcomeOf(slide) === "wrong");
  const picture = document.createElement("img");
  picture.loading = "lazy";
  picture.alt = "";
  picture.src = `api/slides/${slide.number}/thumbnail.jpg?v=${run.version}`;
  picture.addEventListener("error", () => picture.remove());
  row.insertCell().append(picture);
  cell(row, slide.file);
  cell(row, slide.label);
  cell(row, slide.prediction, "prediction");
  cell(row, probabilityOf(slide)?.toFixed(3));
  cell(row, slide.split);
  row.addEventListener("click", () => show(slide.number));
  return row;
}

function wanted() {
  const text = byId("search").value.trim().toLowerCase();
  const [split, outcome] = [byId("split").value, byId("outcome").value];
  const found = run.slides.filter((slide) =>
    (!text || [slide.file, slide.patient, slide.label, slide.prediction ?? ""].some((part) => part.toLowerCase().includes(text))) &&
    (!split || slide.split === split) &&
    (!outcome || outcomeOf(slide) === outcome));
  const key = state.sort;
  if (!key) return found;
  const value = (slide) => (key === "probability" ? probabilityOf(slide) : slide[key]) ?? "";
  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  return found.sort((a, b) => order(value(a), value(b)) * (state.descending ? -1 : 1) || a.number - b.number);
}

function list() {
  const found = wanted();
  for (const slide of found) if (!rows.has(slide.number)) rows.set(slide.number, fillRow(slide));
  byId("slides").tBodies[0].replaceChildren(...found.map((slide) => rows.get(slide.number)));
  rows.get(state.slide)?.setAttribute("aria-selected", "true");
  rows.get(state.slide)?.scrollIntoView({ block: "nearest" });
  byId("count").textContent = `${found.length} of ${run.slides.length} slides`;
}

function sortBy(key) {
  [state.sort, state.descending] = state.sort === key ? [key, !state.descending] : [key, false];
  for (const head of document.querySelectorAll("th[data-key]")) {
    head.removeAttribute("aria-sort");
    if (head.dataset.key === key) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
  }
  list();
}

function step(by) {
  const found = wanted();
  const at = found.findIndex((slide) => slide.number === state.slide);
  const next = found[at === -1 ? 0 : at + by];
  if (next) show(next.number);
}

// ---- one slide

function tiles(address, version, ending, facts) {
  return {
    width: facts.width,
    height: facts.height,
    tileSize: facts.tile_px,
    tileOverlap: 0,
    minLevel: facts.coarsest,
    maxLevel: facts.finest,
    getTileUrl: (level, column, row) => `${address}/${level}/${column}/${row}.${ending}?v=${version}`,
  };
}

async function show(number, view = null) {
  const mine = ++asked;
  const slide = run.slides[number];
  state.slide = number;
  state.facts = null;
  for (const [other, row] of rows) row.setAttribute("aria-selected", String(other === number));
  rows.get(number)?.scrollIntoView({ block: "nearest" });
  byId("slide-name").textContent = slide.file;
  byId("slide-facts").textContent = "";
  document.title = `${slide.file} – ${run.name}`;
  say("opening the slide …");
  viewer.close();
  heat = null;
  drawControls();
  try {
    const facts = await answer(`api/slides/${number}`);
    if (mine !== asked) return;
    state.facts = facts;
  } catch (error) {
    if (mine === asked) say(error.message, { problem: true });
    return;
  }
  say("");
  describe();
  chooseMap();
  viewer.addOnceHandler("open", () => {
    if (mine !== asked) return;
    if (view) goTo(view);
    drawControls();
    showMap();
    drawScale();
    if (["waiting", "working"].includes(state.facts.explanation.state)) watch(number, mine);
  });
  viewer.open(tiles(`api/slides/${number}/tiles`, run.version, "jpg", state.facts));
}

function describe() {
  const [slide, facts] = [run.slides[state.slide], state.facts];
  const mpp = facts.mpp ? `${facts.mpp[0].toPrecision(4)} µm per pixel` : "no scale";
  const said = [`${facts.width} × ${facts.height}`, mpp, facts.format];
  if (slide.label) said.push(`label ${slide.label}`);
  const prediction = slide.prediction ?? facts.explanation.prediction;
  const probability = probabilityOf(slide) ?? facts.explanation.probabilities?.[prediction];
  if (prediction) said.push(`prediction ${prediction} (${probability.toFixed(3)})`);
  byId("slide-facts").textContent = said.join(" · ");
  byId("title").title = `${slide.file} · ${said.join(" · ")}`;
}

// ---- the map over it

const maps = () => state.facts?.explanation.maps ?? [];
const kindOf = (map) => (map.class === null ? map.kind : `${map.kind} for ${map.class}`);
const current = () => maps().findIndex((map) => map.stage === state.stage && kindOf(map) === state.kind);

function chooseMap() {
  if (!maps().length || current() !== -1) return;
  const same = maps().find((map) => map.stage === state.stage && map.kind === state.kind?.split(" ")[0]);
  const main = same ?? maps()[state.facts.explanation.main];
  [state.stage, state.kind] = [main.stage, kindOf(main)];
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, false, String(value) === String(chosen))));
}

function drawControls() {
  const found = maps();
  byId("map-controls").disabled = !found.length;
  const explanation = state.facts?.explanation.state;
  byId("explain").hidden = !explanation || explanation === "there";
  byId("explain").disabled = ["waiting", "working"].includes(explanation);
  byId("explain").textContent = { waiting: "waiting …", working: "explaining …" }[explanation] ?? "Explain this slide";
  if (explanation === "failed") say(state.facts.explanation.problem, { problem: true });
  fill(byId("stage"), [...new Set(found.map((map) => map.stage))], state.stage);
  fill(byId("kind"), found.filter((map) => map.stage === state.stage).map(kindOf), state.kind);
  byId("opacity").value = state.opacity;
  byId("overlay").checked = state.overlay;
  drawColours();
}

const shownOpacity = () => (state.overlay ? state.opacity : 0);

function showMap() {
  const number = current();
  const before = heat;
  heat = null;
  if (number === -1 || !viewer.world.getItemCount()) return;
  const mine = asked;
  const { version } = state.facts.explanation;
  viewer.addTiledImage({
    tileSource: tiles(`api/slides/${state.slide}/maps/${number}`, version, "png", state.facts),
    opacity: shownOpacity(),
    preload: true,
    success: ({ item }) => {
      if (before) viewer.world.removeItem(before);
      if (mine === asked && number === current()) heat = item;
      else viewer.world.removeItem(item);
    },
  });
  drawColours();
}

function pick({ stage = state.stage, kind = state.kind }) {
  [state.stage, state.kind] = [stage, kind];
  if (current() === -1) state.kind = kindOf(maps().find((map) => map.stage === stage && map.kind === kind.split(" ")[0]) ?? maps().find((map) => map.stage === stage));
  drawControls();
  showMap();
  keepAddress();
}

function setOpacity(opacity, overlay = state.overlay) {
  state.opacity = Math.min(1, Math.max(0, opacity));
  state.overlay = overlay;
  heat?.setOpacity(shownOpacity());
  drawControls();
  keepAddress();
}

function drawColours() {
  const map = maps()[current()];
  byId("colour-bar").hidden = !map || !state.overlay;
  if (!map) return;
  const canvas = byId("colours");
  const context = canvas.getContext("2d");
  const gradient = context.createLinearGradient(0, 0, canvas.width, 0);
  const ramp = run.colours[map.kind];
  ramp.forEach((colour, at) => gradient.addColorStop(at / (ramp.length - 1), `rgb(${colour.join(" ")})`));
  context.fillStyle = gradient;
  context.fillRect(0, 0, canvas.width, canvas.height);
  const number = (value) => (Math.abs(value) < 1e-3 && value !== 0 ? value.toExponential(1) : Number(value.toPrecision(2)).toString());
  byId("colour-title").textContent = map.kind === "attention" ? `${map.title}: times the mean` : `${map.title}: logit`;
  canvas.setAttribute("aria-label", `colours from ${number(map.low)} to ${number(map.high)}`);
  byId("low").textContent = number(map.low);
  byId("middle").textContent = number((map.low + map.high) / 2);
  byId("high").textContent = number(map.high);
}

// ---- explaining on demand

async function explain() {
  const [number, mine] = [state.slide, asked];
  if (number === null || !state.facts || byId("explain").hidden || byId("explain").disabled) return;
  say("");
  try {
    const found = await answer(`api/slides/${number}/explanation`, { method: "POST", headers: { "X-Wholeslide": "1" } });
    if (mine !== asked) return;
    state.facts.explanation = found;
    drawControls();
    await watch(number, mine);
  } catch (error) {
    if (mine === asked) say(error.message, { problem: true });
  }
}

async function watch(number, mine) {
  while (mine === asked) {
    await new Promise((done) => setTimeout(done, 700));
    const found = await answer(`api/slides/${number}/explanation`);
    if (mine !== asked) return;
    state.facts.explanation = found;
    if (["waiting", "working"].includes(found.state)) {
      drawControls();
      continue;
    }
    chooseMap();
    drawControls();
    describe();
    showMap();
    keepAddress();
    return;
  }
}

// ---- place and scale

const imagePerScreen = () => state.facts.width / (viewer.viewport.getContainerSize().x * viewer.viewport.getZoom(true));

function drawScale() {
  if (!state.facts || !viewer.world.getItemCount()) return;
  const { mpp } = state.facts;
  const unitsPerScreen = imagePerScreen() * (mpp ? mpp[0] : 1);
  const longest = 150 * unitsPerScreen;
  const power = 10 ** Math.floor(Math.log10(longest));
  const length = [5, 2, 1].map((digit) => digit * power).find((value) => value <= longest);
  byId("scale").hidden = false;
  byId("scale-line").style.width = `${length / unitsPerScreen}px`;
  byId("scale-text").textContent = !mpp ? `${length} px` : length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
}

function keepAddress() {
  if (state.slide === null || !state.facts || !viewer.world.getItemCount()) return;
  const centre = viewer.world.getItemAt(0).viewportToImageCoordinates(viewer.viewport.getCenter());
  const facts = new URLSearchParams({
    slide: run.slides[state.slide].file,
    x: Math.round(centre.x),
    y: Math.round(centre.y),
    px: (state.facts.width / (viewer.viewport.getContainerSize().x * viewer.viewport.getZoom())).toPrecision(4),
    ...(state.stage === null ? {} : { stage: state.stage, map: state.kind }),
    opacity: state.opacity,
    overlay: Number(state.overlay),
  });
  history.replaceState(null, "", `#${facts}`);
}

function goTo({ x, y, px }) {
  const zoom = state.facts.width / (viewer.viewport.getContainerSize().x * px);
  viewer.viewport.zoomTo(zoom, null, true);
  viewer.viewport.panTo(viewer.world.getItemAt(0).imageToViewportCoordinates(x, y), true);
}

function openAddress() {
  const facts = new URLSearchParams(location.hash.slice(1));
  const slide = run.slides.find((one) => one.file === facts.get("slide"));
  if (!slide) {
    if (facts.has("slide")) say(`the run has no slide ${facts.get("slide")}: take one of the list`, { problem: true });
    return facts.has("slide");
  }
  const numberOf = (name, otherwise) => (facts.has(name) && Number.isFinite(Number(facts.get(name))) ? Number(facts.get(name)) : otherwise);
  state.stage = numberOf("stage", state.stage);
  state.kind = facts.get("map") ?? state.kind;
  state.opacity = Math.min(1, Math.max(0, numberOf("opacity", 1)));
  state.overlay = numberOf("overlay", 1) !== 0;
  const [x, y, px] = ["x", "y", "px"].map((name) => numberOf(name, null));
  show(slide.number, x !== null && y !== null && px > 0 ? { x, y, px } : null);
  return true;
}

// ---- what the user does

const stages = () => [...new Set(maps().map((map) => map.stage))];
const kinds = () => maps().filter((map) => map.stage === state.stage).map(kindOf);
const neighbour = (values, value, by) => values[Math.min(values.length - 1, Math.max(0, values.indexOf(value) + by))];

function toggleList() {
  byId("list").hidden = !byId("list").hidden;
  byId("toggle-list").setAttribute("aria-expanded", String(!byId("list").hidden));
}

const keys = {
  j: () => step(1),
  k: () => step(-1),
  "[": () => maps().length && pick({ stage: neighbour(stages(), state.stage, -1) }),
  "]": () => maps().length && pick({ stage: neighbour(stages(), state.stage, 1) }),
  m: () => maps().length && pick({ kind: kinds()[(kinds().indexOf(state.kind) + 1) % kinds().length] }),
  ",": () => setOpacity(state.opacity - 0.1),
  ".": () => setOpacity(state.opacity + 0.1),
  o: () => setOpacity(state.opacity, !state.overlay),
  e: () => explain(),
  l: () => toggleList(),
  "/": () => byId("search").focus(),
  "?": () => byId("help").showModal(),
  "+": () => viewer.viewport.zoomBy(1.5),
  "=": () => viewer.viewport.zoomBy(1.5),
  "-": () => viewer.viewport.zoomBy(1 / 1.5),
  0: () => viewer.viewport.goHome(),
  ArrowLeft: () => pan(-1, 0),
  ArrowRight: () => pan(1, 0),
  ArrowUp: () => pan(0, -1),
  ArrowDown: () => pan(0, 1),
};

function pan(x, y) {
  const bounds = viewer.viewport.getBounds();
  viewer.viewport.panBy(new OpenSeadragon.Point((x * bounds.width) / 8, (y * bounds.height) / 8));
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input:not([type=checkbox]), select, dialog[open]");
  if (typing && event.key === "Escape") typing.blur?.();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});
viewer.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; }); // ours are the same with and without focus
viewer.addHandler("animation", drawScale);
viewer.addHandler("animation-finish", keepAddress);
viewer.addHandler("resize", () => requestAnimationFrame(drawScale));
viewer.addHandler("tile-load-failed", (event) => {
  if (event.tiledImage !== heat) say("a part of the slide cannot be read: what you see is incomplete", { problem: true });
});
for (const event of ["input", "change"]) byId("filters").addEventListener(event, list);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
for (const head of document.querySelectorAll("th[data-key]")) head.addEventListener("click", () => sortBy(head.dataset.key));
byId("stage").addEventListener("change", (event) => pick({ stage: Number(event.target.value) }));
byId("kind").addEventListener("change", (event) => pick({ kind: event.target.value }));
byId("opacity").addEventListener("input", (event) => setOpacity(Number(event.target.value)));
byId("overlay").addEventListener("change", (event) => setOpacity(state.opacity, event.target.checked));
byId("explain").addEventListener("click", explain);
byId("toggle-list").addEventListener("click", toggleList);
byId("help-button").addEventListener("click", () => byId("help").showModal());
addEventListener("hashchange", openAddress);

byId("run-name").textContent = run.name;
byId("run-facts").textContent = `${run.method}: ${run.classes.join(", ")}`;
for (const split of [...new Set(run.slides.map((slide) => slide.split))].filter(Boolean)) byId("split").add(new Option(split));
list();
if (!openAddress() && run.slides.length) step(0);
document.documentElement.dataset.ready = "yes";
