// The tab "Cypher" of the page that `featlas serve` keeps alive: an editor, the named queries, what was asked before, and the answer as a graph,
// a table or JSON. Everything that the atlas says is set as text, never as HTML.

(function () {
  "use strict";
  if (!window.featlasServer) return;

  const KEPT = 60; // queries of the history
  const ROWS_AT_ONCE = 250;
  const FEW_EDGES = 30; // of which each may carry its name
  const FORCE_AT_MOST = 400; // nodes that the force layout takes without a pause
  const HISTORY = "featlas-cypher-history", DRAFT = "featlas-cypher-draft";
  const LABEL_COLOURS = {
    Feature: "#4a7fb5", Circuit: "#b5743a", Run: "#6b8e4e", Sequence: "#8a6bb0", Score: "#9a8c3c", Partition: "#3f8f8a", Block: "#c05f7e", Model: "#6f6f78",
  };
  const KEYWORDS = (
    "MATCH OPTIONAL WHERE RETURN WITH UNWIND ORDER BY LIMIT SKIP DISTINCT AS AND OR NOT IN IS NULL CONTAINS STARTS ENDS CASE WHEN THEN ELSE END UNION ALL " +
    "count collect sum avg min max abs size keys labels nodes length coalesce EXPLAIN DESC ASC EXISTS"
  ).split(" ");

  const h = window.featlas.el;
  const state = { listed: null, answer: null, view: "graph", history: stored(HISTORY, []), at: -1, running: null, chart: null, sort: null };
  const parts = {};

  // --- small things -------------------------------------------------------------------------------------------------

  function stored(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(name)) ?? otherwise;
    } catch {
      return otherwise; // a browser that keeps nothing, or kept something else
    }
  }

  function store(name, value) {
    try {
      localStorage.setItem(name, JSON.stringify(value));
    } catch {
      // the history is a convenience: without room for it there is none
    }
  }

  async function ask(path, body, signal) {
    const options = body ? { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal } : { signal };
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer: is `featlas serve` still running?");
    }
    const said = await response.json();
    if (!response.ok) throw new Error(said.error || response.statusText);
    return said;
  }

  function number(value) {
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return String(value);
    const size = Math.abs(value);
    return size >= 1e-3 && size < 1e6 ? String(+value.toPrecision(5)) : value.toExponential(3);
  }

  function duration(ms) {
    return ms < 10 ? `${ms.toFixed(1)} ms` : ms < 2000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
  }

  function short(text, length) {
    return text.length > length ? text.slice(0, length - 1) + "…" : text;
  }

  function colour(name) {
    return getComputedStyle(parts.root).getPropertyValue(name).trim();
  }

  // --- the tab ------------------------------------------------------------------------------------------------------

  function render(element) {
    parts.root = element;
    element.classList.add("cypher");
    parts.queries = h("div", { className: "cy-list" });
    parts.history = h("div", { className: "cy-list" });
    parts.schema = h("div", { className: "cy-schema" });
    parts.filter = h("input", { type: "search", placeholder: "Filter the named queries", oninput: showQueries });
    parts.form = h("form", { className: "cy-form", hidden: true, onsubmit: (event) => { event.preventDefault(); runNamed(); } });
    parts.editor = h("div", { className: "cy-editor" });
    parts.parameters = h("textarea", { rows: 2, spellcheck: false, placeholder: '{"site": "resid_5"}', "aria-label": "Parameters as JSON" });
    parts.parametersBox = h("details", { className: "cy-parameters" }, h("summary", {}, "Parameters"), parts.parameters);
    parts.rows = h("input", { type: "number", min: 1, className: "cy-rows", "aria-label": "Rows at most" });
    parts.run = h("button", { className: "cy-run", title: "Ctrl+Enter", onclick: run }, "Run");
    parts.stop = h("button", { className: "cy-stop", hidden: true, onclick: () => state.running && state.running.abort() }, "Stop");
    parts.status = h("span", { className: "cy-status", role: "status" });
    parts.error = h("pre", { className: "cy-error", role: "alert", hidden: true });
    parts.tabs = h("div", { className: "cy-tabs" });
    parts.result = h("div", { className: "cy-result", hidden: true });
    parts.body = h("div", { className: "cy-body" });
    parts.result.append(parts.tabs, parts.body);
    element.append(
      h("aside", { className: "cy-side" }, h("h3", {}, "Named queries"), parts.filter, parts.queries,
        h("h3", {}, "What the graph has"), parts.schema, h("h3", {}, "Asked before ", h("button", { className: "plain", onclick: forget }, "forget")), parts.history),
      h("section", { className: "cy-main" }, parts.form, parts.editor, parts.parametersBox,
        h("div", { className: "cy-bar" }, parts.run, parts.stop, h("label", {}, "rows ", parts.rows), parts.status), parts.error, parts.result),
    );
    parts.edit = window.featlasEditor.create(parts.editor, {
      text: stored(DRAFT, "MATCH (a:Feature)-[e:INFLUENCES]->(b:Feature)\nRETURN a, e, b\nORDER BY e.abs_weight DESC\nLIMIT 40"),
      onRun: run, onChange: (text) => store(DRAFT, text), words, hint: "Cypher; Ctrl+Enter runs it, Ctrl+↑ and Ctrl+↓ go through what was asked before",
    });
    element.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && (event.key === "ArrowUp" || event.key === "ArrowDown") && parts.editor.contains(event.target)) {
        event.preventDefault();
        recall(event.key === "ArrowUp" ? 1 : -1);
      }
    }, true);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.chart && state.chart.style(drawingStyle()));
    showHistory();
    load();
    return { update: () => true, shown: () => state.chart && state.chart.resize() };
  }

  async function load() {
    try {
      state.listed = await ask("api/queries");
      parts.rows.value ||= state.listed.limits.rows;
      parts.rows.max = state.listed.limits.most_rows;
      parts.status.textContent = `${state.listed.dialect === "neo4j" ? "Neo4j's" : "Ladybug's"} Cypher, reading only`;
      showQueries();
      showSchema();
    } catch (error) {
      fail(error);
    }
  }

  /** What the editor completes, by what stands before the cursor. */
  function words() {
    const schema = state.listed ? state.listed.schema : { nodes: {}, edges: {} };
    const properties = new Set([...Object.values(schema.nodes).flat(), ...Object.values(schema.edges).flatMap((edge) => edge.properties)]);
    let given = {};
    try {
      given = readParameters();
    } catch {
      // half-written parameters have no names yet
    }
    return {
      ":": [...Object.keys(schema.nodes).map((label) => ({ label, type: "class" })), ...Object.keys(schema.edges).map((label) => ({ label, type: "type" }))],
      ".": [...properties].sort().map((label) => ({ label, type: "property" })),
      "$": Object.keys(given).map((label) => ({ label, type: "variable" })),
      word: KEYWORDS.map((label) => ({ label, type: "keyword" })),
    };
  }

  // --- the named queries, the schema, the history -------------------------------------------------------------------

  function showQueries() {
    const wanted = parts.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const said = (query) => `${query.name} ${query.name.replaceAll("_", " ")} ${query.doc}`.toLowerCase();
    const fitting = state.listed.queries.filter((query) => wanted.every((word) => said(query).includes(word)));
    parts.queries.replaceChildren(...fitting.map((query) =>
      h("button", { className: "cy-item", "data-query": query.name, title: query.doc, onclick: () => choose(query) },
        h("b", {}, query.name.replaceAll("_", " ")), h("span", {}, query.doc))));
    if (!fitting.length) parts.queries.replaceChildren(h("p", { className: "cy-none" }, "No query is called so."));
  }

  function choose(query) {
    const choices = state.listed.choices;
    const fields = query.parameters.map((parameter) => {
      const known = choices[parameter.name] || [];
      const list = known.length ? h("datalist", { id: `cy-known-${parameter.name}` }, known.map((value) => h("option", { value }))) : null;
      const value = parameter.default ?? (parameter.required && known.length ? known[0] : "");
      const input = h("input", { name: parameter.name, value: String(value ?? ""), list: list && list.id, autocomplete: "off", spellcheck: false });
      return h("label", { title: parameter.doc }, h("span", {}, parameter.name, h("small", {}, ` ${parameter.kind}`)), input, list, h("small", {}, parameter.doc));
    });
    parts.form.dataset.query = query.name;
    parts.form.replaceChildren(
      h("div", { className: "cy-asked" }, h("b", {}, query.name), " ", query.doc), ...fields,
      h("div", { className: "cy-bar" }, h("button", { className: "cy-run", type: "submit" }, "Ask"),
        h("button", { type: "button", onclick: () => { parts.form.hidden = true; } }, "Close")));
    parts.form.hidden = false;
    for (const item of parts.queries.children) item.classList.toggle("chosen", item.dataset.query === query.name);
    const first = parts.form.querySelector("input");
    if (query.parameters.some((parameter) => parameter.required && !(choices[parameter.name] || []).length)) first.focus();
    else runNamed();
  }

  async function runNamed() {
    const given = {};
    for (const input of parts.form.querySelectorAll("input")) if (input.value.trim()) given[input.name] = input.value.trim();
    const said = await send({ name: parts.form.dataset.query, parameters: given });
    if (said) {
      parts.edit.setText(said.cypher);
      setParameters(said.parameters);
    }
  }

  function showSchema() {
    const { nodes, edges } = state.listed.schema;
    const chip = (name, text, kind, title) => h("button", { className: `cy-chip ${kind}`, title, onclick: () => { parts.edit.setText(text); setParameters({}); run(); } }, name);
    const ends = (edge) => edge.ends.length === 1 ? [`:${edge.ends[0][0]}`, `:${edge.ends[0][1]}`] : ["", ""];
    parts.schema.replaceChildren(
      h("div", {}, Object.entries(nodes).map(([label, properties]) => chip(label, `MATCH (n:${label})\nRETURN n\nLIMIT 25`, "node", properties.join(", ")))),
      h("div", {}, Object.entries(edges).map(([type, edge]) =>
        chip(type, `MATCH (a${ends(edge)[0]})-[e:${type}]->(b${ends(edge)[1]})\nRETURN a, e, b\nLIMIT 40`, "edge",
          `${edge.ends.map((pair) => pair.join(" → ")).join(", ")}: ${edge.properties.join(", ")}`))));
  }

  function remember(cypher, parameters, said) {
    const entry = { cypher, parameters, rows: said.rows.length, cut: said.cut, ms: said.ms, when: Date.now() };
    const same = (other) => other.cypher === cypher && JSON.stringify(other.parameters) === JSON.stringify(parameters);
    state.history = [entry, ...state.history.filter((other) => !same(other))].slice(0, KEPT);
    state.at = 0;
    store(HISTORY, state.history);
    showHistory();
  }

  function showHistory() {
    parts.history.replaceChildren(...state.history.map((entry, i) =>
      h("button", { className: "cy-item", title: entry.cypher, onclick: () => { state.at = i; put(entry); } },
        h("code", {}, short(entry.cypher.replace(/\s+/g, " "), 90)), h("span", {}, `${entry.rows}${entry.cut ? "+" : ""} rows, ${duration(entry.ms)}`))));
  }

  function forget() {
    state.history = [];
    state.at = -1;
    store(HISTORY, []);
    showHistory();
  }

  function recall(step) {
    const next = Math.min(Math.max(state.at + step, 0), state.history.length - 1);
    if (state.history[next]) {
      state.at = next;
      put(state.history[next]);
    }
  }

  function put(entry) {
    parts.edit.setText(entry.cypher);
    setParameters(entry.parameters);
    parts.edit.focus();
  }

  // --- asking -------------------------------------------------------------------------------------------------------

  function readParameters() {
    const text = parts.parameters.value.trim();
    if (!text) return {};
    let given;
    try {
      given = JSON.parse(text);
    } catch (error) {
      throw new Error(`The parameters are not JSON: ${error.message}`);
    }
    if (given === null || typeof given !== "object" || Array.isArray(given)) throw new Error('Parameters are an object, for example {"site": "resid_5"}');
    return given;
  }

  function setParameters(given) {
    const any = given && Object.keys(given).length > 0;
    parts.parameters.value = any ? JSON.stringify(given) : "";
    parts.parametersBox.open = Boolean(any) && parts.form.hidden;
  }

  async function run() {
    let parameters;
    try {
      parameters = readParameters();
    } catch (error) {
      fail(error);
      return;
    }
    const cypher = parts.edit.text().trim().replace(/;$/, "");
    if (cypher) await send({ cypher, parameters });
  }

  /** Send a query and show its answer; the answer, or null where there is none. A query that still runs is given up. */
  async function send(body) {
    if (state.running) state.running.abort();
    const running = new AbortController();
    state.running = running;
    parts.stop.hidden = false;
    parts.error.hidden = true;
    const began = performance.now();
    parts.status.textContent = "asking …";
    const clock = setInterval(() => { parts.status.textContent = `asking … ${((performance.now() - began) / 1000).toFixed(0)} s`; }, 1000);
    try {
      const said = await ask("api/query", { ...body, rows: Number(parts.rows.value) || undefined }, running.signal);
      if (running !== state.running) return null;
      show(said);
      remember(said.cypher, said.parameters, said);
      return said;
    } catch (error) {
      if (error.name !== "AbortError") fail(error);
      else if (running === state.running) parts.status.textContent = "stopped waiting; the database gives up at its time limit";
      return null;
    } finally {
      clearInterval(clock);
      if (running === state.running) {
        state.running = null;
        parts.stop.hidden = true;
      }
    }
  }

  function fail(error) {
    parts.error.textContent = error.message;
    parts.error.hidden = false;
    parts.status.textContent = "";
  }

  // --- the answer ---------------------------------------------------------------------------------------------------

  function show(said) {
    state.answer = said;
    state.sort = null;
    const { nodes, edges } = said.graph;
    const cut = said.cut ? `, the first ${said.rows.length}: there are more (raise "rows", or set a LIMIT)` : "";
    parts.status.textContent = `${said.rows.length} ${said.rows.length === 1 ? "row" : "rows"} in ${duration(said.ms)}${cut}`;
    parts.result.hidden = false;
    if (!nodes.length && state.view === "graph") state.view = "table";
    else if (nodes.length && edges.length && state.view === "table" && !state.chosen) state.view = "graph";
    showView();
  }

  function showView() {
    const { nodes } = state.answer.graph;
    const views = { graph: "Graph", table: "Table", json: "JSON" };
    const button = (name) => h("button", {
      className: state.view === name ? "chosen" : "", disabled: name === "graph" && !nodes.length, "data-view": name,
      onclick: () => { state.view = name; state.chosen = true; showView(); },
    }, views[name]);
    parts.tabs.replaceChildren(
      ...Object.keys(views).map(button), h("span", { className: "cy-gap" }),
      h("button", { className: "plain", onclick: () => save("answer.csv", "text/csv", csv()) }, "CSV"),
      h("button", { className: "plain", onclick: () => save("answer.json", "application/json", JSON.stringify(objects(), null, 1)) }, "JSON"),
      ...(state.view === "graph" ? [h("button", { className: "plain", onclick: saveImage }, "PNG")] : []));
    if (state.chart) {
      state.chart.destroy();
      state.chart = null;
    }
    if (state.view === "graph") showGraph();
    else if (state.view === "table") showTable(ROWS_AT_ONCE);
    else parts.body.replaceChildren(h("pre", { className: "cy-json" }, JSON.stringify(objects(), null, 1)));
  }

  function objects() {
    return state.answer.rows.map((row) => Object.fromEntries(row.map((value, i) => [state.answer.columns[i], value])));
  }

  function csv() {
    const cell = (value) => {
      const text = value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [state.answer.columns, ...state.answer.rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  function save(name, type, content) {
    const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
    h("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  function saveImage() {
    save("answer.png", "image/png", state.chart.png({ output: "blob", scale: 2, bg: colour("--paper"), full: true }));
  }

  // --- table --------------------------------------------------------------------------------------------------------

  function showTable(n) {
    const { columns, rows } = state.answer;
    const order = sorted(rows);
    const numeric = columns.map((_, i) => rows.some((row) => row[i] !== null) && rows.every((row) => row[i] === null || typeof row[i] === "number"));
    const head = columns.map((name, i) => h("th", { className: numeric[i] ? "number" : "" }, h("button", {
      className: "plain", title: "Sort",
      onclick: () => { state.sort = { column: i, down: state.sort && state.sort.column === i ? !state.sort.down : numeric[i] }; showTable(n); },
    }, name, state.sort && state.sort.column === i ? (state.sort.down ? " ↓" : " ↑") : "")));
    const body = order.slice(0, n).map((row) => h("tr", {}, row.map((value, i) => h("td", { className: numeric[i] ? "number" : "" }, cell(value, columns[i])))));
    const more = rows.length > n && h("button", { onclick: () => showTable(n + 4 * ROWS_AT_ONCE) }, `Show more of the ${rows.length} rows`);
    const empty = !rows.length && h("p", { className: "cy-none" }, "No rows.");
    parts.body.replaceChildren(...[h("div", { className: "cy-table" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body))), more, empty].filter(Boolean));
  }

  function sorted(rows) {
    if (!state.sort) return rows;
    const { column, down } = state.sort;
    const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
    const compare = (a, b) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const by = typeof a === "number" && typeof b === "number" ? a - b : text(a).localeCompare(text(b), undefined, { numeric: true });
      return down ? -by : by;
    };
    return [...rows].sort((a, b) => compare(a[column], b[column]));
  }

  /** A value of a table: nodes, edges and paths in short, features' keys as what opens their page. */
  function cell(value, column) {
    if (value === null) return h("span", { className: "cy-null" }, "null");
    if (typeof value === "number") return number(value);
    if (typeof value === "string") return featureOf(value) ? opener(value, place(featureOf(value))) : value;
    if (typeof value !== "object") return String(value);
    if (Array.isArray(value)) return value.length ? value.flatMap((item, i) => (i ? [", ", cell(item, column)] : [cell(item, column)])) : "[]";
    if (value.properties && value.label) {
      const node = state.answer.graph.nodes.find((known) => known.label === value.label && known.key === value.properties.key);
      const name = node ? node.name : value.properties.key;
      return value.label === "Feature" ? opener(value.properties.key, name) : h("span", { className: "cy-node", title: JSON.stringify(value.properties) }, `${value.label} ${name}`);
    }
    if (value.properties && value.type) {
      const weight = value.properties.weight;
      return h("span", { className: "cy-edge", title: JSON.stringify(value) }, value.type, weight === undefined ? "" : ` ${number(weight)}`);
    }
    if (value.nodes && value.relationships) return value.nodes.flatMap((node, i) => (i ? [" → ", cell(node, column)] : [cell(node, column)]));
    return h("code", {}, JSON.stringify(value));
  }

  function featureOf(key) {
    return state.answer.graph.nodes.find((node) => node.label === "Feature" && node.key === key);
  }

  /** Where a feature is: shorter than its key, which stands in the tip and in what is saved. */
  function place({ properties }) {
    return properties.kind === "feature" ? `${properties.site}/${properties.index}` : properties.kind === "error" ? `error of ${properties.site}` : properties.site;
  }

  function opener(key, name) {
    return h("button", { className: "cy-feature", title: key, onclick: () => window.featlas.showFeature(key) }, name);
  }

  // --- graph --------------------------------------------------------------------------------------------------------

  function showGraph() {
    const drawn = state.answer.graph;
    const canvas = h("div", { className: "cy-canvas" });
    parts.panel = h("div", { className: "cy-panel" });
    parts.arrange = h("select", { "aria-label": "Arrangement", onchange: arrange },
      h("option", { value: "layers" }, "by layer"), h("option", { value: "force" }, "by force"), h("option", { value: "circle" }, "in circles"));
    parts.count = h("span", {});
    parts.body.replaceChildren(h("div", { className: "cy-graph" }, canvas, h("div", { className: "cy-tools" }, parts.arrange,
      h("button", { onclick: () => state.chart.fit(undefined, 40) }, "Fit"), parts.count), parts.panel));
    state.chart = window.cytoscape({
      container: canvas, elements: [], style: drawingStyle(), minZoom: 0.05, maxZoom: 6, layout: { name: "preset" },
      textureOnViewport: drawn.nodes.length + drawn.edges.length > 1500,
    });
    addToChart(drawn);
    const layered = drawn.nodes.filter((node) => node.label === "Feature").length >= 0.7 * drawn.nodes.length && drawn.edges.length > 0;
    parts.arrange.value = layered ? "layers" : drawn.nodes.length <= FORCE_AT_MOST ? "force" : "circle";
    arrange();
    listen();
    legend();
  }

  function addToChart({ nodes, edges }) {
    const chart = state.chart;
    const layers = nodes.map((node) => node.properties.layer).filter((layer) => typeof layer === "number" && layer >= 0);
    state.deepest = Math.max(state.deepest || 1, ...layers);
    const heaviest = Math.max(1e-12, ...edges.map((edge) => Math.abs(edge.properties.weight || 0)));
    chart.add(nodes.filter((node) => chart.getElementById(node.id).empty()).map((node) => ({ group: "nodes", data: {
      ...node, caption: short(String(node.name), 40), fill: fill(node), shape: shape(node), size: node.label === "Feature" ? 22 : 30,
    } })));
    const identity = (edge) => JSON.stringify([edge.type, edge.source, edge.target, edge.properties]);
    chart.add(edges.filter((edge) => chart.getElementById(identity(edge)).empty()).map((edge) => {
      const weight = edge.properties.weight;
      return { group: "edges", data: {
        ...edge, id: identity(edge), sign: typeof weight !== "number" ? 0 : Math.sign(weight),
        width: typeof weight === "number" ? 1 + 4 * Math.sqrt(Math.abs(weight) / heaviest) : 1.3,
      } };
    }));
    // an edge is called by its type where there are several, and by its weight where it has one
    const types = new Set(chart.edges().map((edge) => edge.data("type")));
    chart.edges().forEach((edge) => {
      const { type, properties } = edge.data(), weight = typeof properties.weight === "number" ? Number(properties.weight.toPrecision(2)) : "";
      edge.data("caption", types.size > 1 && type !== "row" && type !== "path" ? `${type} ${weight}`.trim() : `${weight}`);
    });
    chart.edges().toggleClass("named", chart.edges().length <= FEW_EDGES);
    const cut = state.answer.graph.cut ? " (the first of more)" : "";
    parts.count.textContent = `${chart.nodes().length} nodes, ${chart.edges().length} edges${cut}`;
  }

  /** A feature's colour goes with its layer, as in the drawings of circuits. */
  function fill(node) {
    const { layer, kind } = node.properties;
    if (node.label !== "Feature") return LABEL_COLOURS[node.label] || "#888";
    if (kind === "output") return "#c8882b";
    if (kind === "error") return "#9b9b9b";
    return typeof layer === "number" && layer >= 0 ? window.featlas.mixed(layer / Math.max(1, state.deepest)) : LABEL_COLOURS.Feature;
  }

  function shape(node) {
    if (node.label !== "Feature") return "round-rectangle";
    return node.properties.kind === "error" ? "diamond" : node.properties.kind === "output" ? "star" : "ellipse";
  }

  function drawingStyle() {
    const ink = colour("--ink"), ground = colour("--paper"), soft = colour("--faint");
    return [
      { selector: "node", style: {
        "background-color": "data(fill)", shape: "data(shape)", width: "data(size)", height: "data(size)", label: "data(caption)", color: ink, "font-size": 11,
        "text-valign": "bottom", "text-margin-y": 4, "text-outline-color": ground, "text-outline-width": 2, "min-zoomed-font-size": 6,
        "text-wrap": "wrap", "text-max-width": 92,
      } },
      { selector: "edge", style: {
        width: "data(width)", "line-color": soft, "target-arrow-color": soft, "target-arrow-shape": "triangle", "arrow-scale": 0.9, "curve-style": "bezier",
        opacity: 0.75, "font-size": 9, color: ink, "text-rotation": "autorotate", "text-outline-color": ground, "text-outline-width": 2, "min-zoomed-font-size": 8,
      } },
      { selector: "edge.named, edge.near, edge:selected", style: { label: "data(caption)" } },
      { selector: "edge[sign > 0]", style: { "line-color": colour("--up"), "target-arrow-color": colour("--up") } },
      { selector: "edge[sign < 0]", style: { "line-color": colour("--down"), "target-arrow-color": colour("--down") } },
      { selector: "node.raised", style: { "text-valign": "top", "text-margin-y": -4 } },
      { selector: ".far", style: { opacity: 0.12 } },
      { selector: "node:selected", style: { "border-width": 4, "border-color": colour("--link") } },
      { selector: "edge:selected", style: { width: 6 } },
    ];
  }

  function arrange() {
    const chart = state.chart, name = parts.arrange.value;
    chart.nodes().removeClass("raised");
    if (name === "layers") {
      const positions = layerPositions(chart);
      chart.layout({ name: "preset", positions: (node) => positions[node.id()], fit: true, padding: 40 }).run();
    } else if (!chart.edges().length) {
      chart.layout({ name: "grid", fit: true, padding: 40, avoidOverlapPadding: 30 }).run();
    } else if (name === "force") {
      chart.layout({
        name: "cose", animate: false, randomize: true, fit: true, padding: 40, nodeRepulsion: () => 9000, idealEdgeLength: () => 90, nodeDimensionsIncludeLabels: true,
        numIter: chart.nodes().length > 150 ? 400 : 1000,
      }).run();
    } else chart.layout({ name: "concentric", fit: true, padding: 40, minNodeSpacing: 16, concentric: (node) => node.degree(), levelWidth: (nodes) => Math.max(1, nodes.maxDegree() / 6) }).run();
  }

  /** Rows by layer, the input below; within a row nodes stand by the mean place of what they are joined to. */
  function layerPositions(chart) {
    const height = (node) => {
      const { properties, label } = node.data();
      if (label !== "Feature") return -2;
      if (properties.kind === "output") return 1e6;
      return properties.layer < 0 ? -1 : properties.layer + { attn: 0, mlp: 0.3, resid: 0.6 }[String(properties.site).split("_")[0]] || 0;
    };
    const rows = new Map();
    chart.nodes().forEach((node) => {
      const at = height(node);
      rows.set(at, [...(rows.get(at) || []), node]);
    });
    const heights = [...rows.keys()].sort((a, b) => a - b), x = {};
    for (const at of heights) rows.get(at).forEach((node, i) => { x[node.id()] = i - rows.get(at).length / 2; });
    for (let sweep = 0; sweep < 6; sweep += 1) {
      for (const at of sweep % 2 ? [...heights].reverse() : heights) {
        const mean = new Map(rows.get(at).map((node) => {
          const others = node.neighborhood("node").map((other) => x[other.id()]);
          return [node.id(), others.length ? others.reduce((sum, value) => sum + value, 0) / others.length : x[node.id()]];
        }));
        rows.get(at).sort((a, b) => mean.get(a.id()) - mean.get(b.id()));
        rows.get(at).forEach((node, i) => { x[node.id()] = i - (rows.get(at).length - 1) / 2; });
      }
    }
    // steps that fill the canvas, so that names are read without zooming as long as there are not too many
    const widest = Math.max(...[...rows.values()].map((row) => row.length)), bounded = (value, low, high) => Math.min(high, Math.max(low, value));
    const across = bounded((chart.width() - 100) / widest, 46, 150), down = bounded((chart.height() - 120) / heights.length, 84, 150);
    const positions = {};
    heights.forEach((at, i) => {
      const step = Math.min(170, across * Math.min(3, widest / rows.get(at).length) ** 0.6); // narrow rows are spread a little
      rows.get(at).forEach((node, j) => {
        positions[node.id()] = { x: step * x[node.id()], y: -down * i };
        node.toggleClass("raised", step < 100 && j % 2 === 1); // names of neighbours above and below in turn
      });
    });
    return positions;
  }

  function listen() {
    const chart = state.chart;
    chart.on("mouseover", "node", ({ target }) => {
      const near = target.closedNeighborhood();
      chart.elements().not(near).addClass("far");
      near.edges().addClass("near");
    });
    chart.on("mouseout", "node", () => chart.elements().removeClass("far near"));
    chart.on("tap", "node", ({ target }) => describeNode(target.data()));
    chart.on("dbltap", "node", ({ target }) => expand(target));
    chart.on("tap", "edge", ({ target }) => describeEdge(target));
    chart.on("tap", ({ target }) => target === chart && legend());
  }

  function legend() {
    const labels = [...new Set(state.chart.nodes().map((node) => node.data("label")))];
    parts.panel.replaceChildren(
      h("p", { className: "cy-hint" }, "Click a node or an edge for what it says, double-click a node for its neighbours."),
      ...labels.map((label) => h("div", { className: "cy-legend" }, h("i", { style: { background: LABEL_COLOURS[label] || "#888" } }), label,
        h("small", {}, ` ${state.chart.nodes().filter((node) => node.data("label") === label).length}`))));
  }

  function describeNode(node) {
    const target = state.chart.getElementById(node.id);
    parts.panel.replaceChildren(...[
      h("h4", {}, node.name), h("div", { className: "cy-bar" },
        node.label === "Feature" && h("button", { className: "cy-run", "data-feature": node.key, onclick: () => window.featlas.showFeature(node.key) }, "Its page"),
        h("button", { "data-expand": node.id, onclick: () => expand(target) }, "Neighbours"),
        h("button", { onclick: () => { target.remove(); legend(); } }, "Hide")),
      h("div", { className: "cy-kind" }, node.label), propertyTable(node.properties)]);
  }

  function describeEdge(target) {
    const edge = target.data();
    parts.panel.replaceChildren(
      h("h4", {}, edge.type === "row" ? "A row of the answer" : edge.type === "path" ? "A step of a path" : edge.type),
      h("div", { className: "cy-kind" }, target.source().data("name"), " → ", target.target().data("name")), propertyTable(edge.properties));
  }

  function propertyTable(properties) {
    const rows = Object.entries(properties).sort(([a], [b]) => (a === "key") - (b === "key") || a.localeCompare(b));
    return h("table", { className: "cy-properties" }, h("tbody", {}, rows.map(([name, value]) =>
      h("tr", {}, h("th", {}, name), h("td", {}, typeof value === "number" ? number(value) : typeof value === "object" ? JSON.stringify(value) : String(value))))));
  }

  /** Draw what a node is joined to around it. */
  async function expand(node) {
    try {
      const said = await ask("api/query", { name: "neighbours", parameters: { key: node.data("key") } });
      const before = new Set(state.chart.nodes().map((other) => other.id()));
      addToChart(said.graph);
      const fresh = state.chart.nodes().filter((other) => !before.has(other.id()));
      const { x, y } = node.position();
      fresh.forEach((other, i) => {
        const angle = (2 * Math.PI * i) / fresh.length, far = 70 + 14 * Math.sqrt(fresh.length) * (1 + (i % 3) / 2);
        other.position({ x: x + far * Math.cos(angle), y: y + far * Math.sin(angle) });
      });
      describeNode(node.data());
      parts.panel.append(h("p", { className: "cy-hint" }, `${fresh.length} more ${fresh.length === 1 ? "node" : "nodes"}`));
      if (fresh.length) state.chart.animate({ fit: { eles: state.chart.elements(), padding: 40 }, duration: 250 });
    } catch (error) {
      fail(error);
    }
  }

  window.featlas.addTab("Cypher", render);
  // the other sections begin with the overview: where it cannot be had, queries still can
  window.featlas.atlas.get("overview").catch(async (error) => {
    await window.featlas.start();
    if (parts.error) fail(error);
  });
})();
