// The sections of the page, one tab each: what the atlas holds, its circuits, features, sweeps, regions, communities, matchings, comparisons, series.
(() => {
  "use strict";
  const { atlas, el, table, frame, figure, exhibit, number, signed, percent, shown, address, go, addTab, showFeature, drawGraph, featureNames, mixed, RAMP } = window.featlas;

  const head = (title, subtitle) => [el("h1", {}, title), subtitle ? el("div", { class: "soft" }, subtitle) : null];
  const settings = (rows) => el("table", { class: "settings" }, el("tbody", {}, rows.map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", {}, String(value))))));
  const plain = (value) => (value === null || value === undefined || value === "" ? null : typeof value === "object" ? JSON.stringify(value) : value);
  const picker = (label, options, chosen, change) => {
    const select = el("select", { onchange: () => change(select.value) }, options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
    return options.length > 1 ? el("label", {}, label, select) : null;
  };
  const fresh = (changes) => ({ tab: null, run: null, circuit: null, sequence: null, task: null, partition: null, block: null, subject: null, baseline: null, matching: null, comparison: null, series: null, edges: null, least: null, by: null, threshold: null, ...changes });
  const nodeButton = (node, text) => el("button", { type: "button", class: `node ${node.kind || ""}`, onclick: () => showFeature(node.key) }, shown(text ?? node.name ?? node.key).slice(0, 44), el("small", {}, node.site));

  // --- overview --------------------------------------------------------------------------------------------------------

  const NODES = ["Model", "Feature", "Sequence", "Run", "Circuit", "Score", "Partition", "Block"];
  const overview = async (element) => {
    const all = await atlas.get("overview");
    const tiles = [["runs", all.runs.length, "circuits"], ["circuits", all.circuits.length, "circuits"], ["sweeps", all.sweeps.length, "faithfulness"], ["parcellations", all.parcellations.length, "regions"], ["divisions into communities", all.communities.length, "communities"], ["matchings", all.matchings.length, "matching"], ["comparisons", all.comparisons.length, "comparisons"], ["series of models", all.series.length, "series"], ["features", all.counts.Feature || 0, "features"]].filter(([, n]) => n);
    element.append(...head(all.atlas, all.models.map((model) => `${model.key}${model.n_layers ? `, ${model.n_layers} layers, ${model.d_model} wide` : ""}`).join(" · ")).filter(Boolean),
      el("div", { class: "numbers" }, tiles.map(([name, n, tab]) => el("button", { type: "button", onclick: () => go(fresh({ tab })) }, el("b", {}, number(n)), n === 1 ? name.replace(/^(?!series)(\w+)s\b/, "$1") : name))));
    if (all.held) element.append(el("p", { class: "warn" }, all.held));
    const section = (title, ...children) => element.append(el("h2", {}, title), ...children.flat().filter(Boolean));
    if (all.runs.length) section("Runs", el("p", { class: "soft" }, "Effects of features on one another and on a metric, sequence by sequence."), table(
      [{ name: "run", node: (key) => el("b", {}, key.slice(0, 8)) }, "task", "method", "steps", "metric", "baseline", { name: "threshold", number: true }, "sequences", "edges", "model"],
      all.runs.map((run) => [run.key, run.task, run.method, run.steps, run.metric, run.baseline, run.threshold, run.n_sequences, run.n_edges, run.model]),
      { onRow: (row) => go(fresh({ tab: "circuits", run: row[0] })) }));
    const circuits = all.circuits.filter((circuit) => circuit.of === "features");
    if (circuits.length) section("Circuits", table(
      [{ name: "circuit", node: (key) => el("b", {}, key.slice(0, 8)) }, "task", "nodes", "edges", { name: "average degree", number: true }, { name: "density", number: true }, { name: "faithfulness", number: true, format: (v) => number(v) }, { name: "completeness", number: true, format: (v) => number(v) }, "made of"],
      circuits.map((circuit) => [circuit.key, circuit.task || "all", circuit.n_nodes, circuit.n_edges, circuit.average_degree, circuit.density, circuit.faithfulness, circuit.completeness, circuit.description]),
      { onRow: (row) => go(fresh({ tab: "circuits", circuit: row[0] })) }));
    const studies = [
      ...all.sweeps.map((sweep) => [{ tab: "faithfulness", subject: sweep.subject, baseline: sweep.baseline }, `Sweep: ${sweep.tasks.join(", ")}`, `${sweep.n_sizes} sizes, ${sweep.n_sequences} sequences, ${sweep.methods.length} methods, baseline ${sweep.baseline}`]),
      ...all.parcellations.map((p) => [{ tab: "regions", partition: p.key }, `Regions: ${p.method} of ${p.basis}s`, `${number(p.n_blocks)} regions in ${p.sites.length} sites, ${p.key.slice(0, 8)}`]),
      ...all.communities.map((c) => [{ tab: "communities", partition: c.parcellation }, `Communities: ${c.method}`, `${number(c.n_blocks)} communities, ${c.notes.quantity || "modularity"} ${number(c.notes.modularity)}, run ${String(c.run).slice(0, 8)}`]),
      ...all.matchings.map((m) => [{ tab: "matching", matching: m.matching }, `Matching: ${m.model_a} and ${m.model_b}`, `${number(m.n_matched)} pairs, ${percent(m.share_a)} of A`]),
      ...all.comparisons.map((c) => [{ tab: "comparisons", comparison: c.comparison }, `Comparison: ${c.a} and ${c.b}`, c.kind]),
      ...all.series.map((s) => [{ tab: "series", series: s.series }, `Series: ${s.title}`, `${s.models.length} models by ${s.axis}, ${s.models[0]} to ${s.models[s.models.length - 1]}`]),
    ];
    if (studies.length) section("Studies", el("div", { class: "cards" }, studies.map(([changes, title, text]) => el("a", { class: "card", href: `#${window.featlas.query(changes)}` }, el("b", {}, title), el("span", { class: "soft small" }, text)))));
    if (all.statistics.length) section("Statistics", table(["run", "corpus", "basis", "status", "sequences", "tokens", "model"], all.statistics.map((r) => [r.run.slice(0, 8), r.corpus, r.basis, r.status, r.sequences, r.tokens, r.model])));
    if (all.samples.length) section("Samples", table(["key", "source", "basis", "sites", "sequences", "tokens"], all.samples.map((r) => [r.key.slice(0, 8), r.source, r.basis, r.sites.join(", "), r.n_sequences, r.n_tokens])));
    section("What the graph holds", el("div", { class: "row" }, Object.entries(all.counts).map(([name, n]) => el("span", { class: "chip" }, `${NODES.includes(name) ? `:${name}` : `[:${name}]`} ${number(n)}`))));
    if (all.commands.length) section("What made it", el("p", { class: "soft" }, "From the manifests of its runs: these commands make the same again."), el("pre", {}, all.commands.join("\n")));
  };

  // --- circuits --------------------------------------------------------------------------------------------------------

  const START = 300;  // edges that are shown at first
  const flow = (page, counts) => {
    const rows = page.sites.map((site) => ({ site, features: 0, errors: 0, n: 0 }));
    page.nodes.forEach((node, i) => { if (!counts.alive[i]) return; rows[node.row].n++; rows[node.row][node.kind === "error" ? "errors" : "features"] += counts.influence[i]; });
    const shownRows = rows.map((row, i) => ({ ...row, colour: mixed(i / Math.max(rows.length - 2, 1)) })).filter((row, i) => !page.nodes.some((node) => node.row === i && node.kind === "output")).reverse();
    return el("div", { class: "flow" }, shownRows.map((row) => [
      el("span", {}, row.site),
      el("div", { class: "bar", title: `features ${percent(row.features)}, error node ${percent(row.errors)}` }, el("span", { style: { width: `${100 * Math.min(row.features, 1)}%`, background: row.colour } }), el("span", { style: { width: `${100 * Math.min(row.errors, 1)}%`, background: "var(--faint)" } })),
      el("span", { class: "soft" }, `${percent(row.features, 0)} by ${number(row.n)} nodes${row.errors > 0.0005 ? `, ${percent(row.errors, 0)} by the error node` : ""}`),
    ]));
  };

  const stored = async (parameters) => {
    try { return await atlas.get("circuit", parameters); } catch (error) { return { error }; }
  };

  const circuits = async (element, now) => {
    const all = await atlas.get("overview");
    if (!all.runs.length) { element.append(...head("Circuits"), el("p", {}, "The atlas has no runs yet: `featlas ingest edges` makes them.")); return null; }
    const named = now.circuit ? all.circuits.find((circuit) => circuit.key.startsWith(now.circuit)) : null;
    const key = named ? named.run : (now.run && all.runs.find((run) => run.key.startsWith(now.run)) || all.runs[0]).key;
    const run = await atlas.get("run", { run: key });
    element.append(...head(run.title, run.subtitle).filter(Boolean));
    const own = all.circuits.filter((circuit) => circuit.run === key && circuit.of === "features");
    const change = (changes) => go(fresh({ tab: "circuits", run: key, ...changes }));
    const tasks = run.tasks.rows.map((row) => row[0]);
    const what = now.circuit ? `circuit:${named ? named.key : now.circuit}` : now.sequence ? `sequence:${now.sequence}` : now.task ? `task:${now.task}` : "run:";
    const choices = [
      ["run:", `all ${number(run.sequences.length)} sequences`],
      ...(tasks.length > 1 ? tasks.map((task) => [`task:${task}`, `task ${task}`]) : []),
      ...own.map((circuit) => [`circuit:${circuit.key}`, `circuit ${circuit.key.slice(0, 8)}: ${circuit.n_edges} edges${circuit.task ? `, ${circuit.task}` : ""}`]),
    ];
    const sequences = run.sequences.map((sequence) => [`sequence:${sequence.key}`, `${sequence.task}: ${sequence.clean}${sequence.answer}`.slice(0, 90)]);
    const choose = (value) => { const [kind, ...rest] = value.split(":"); change(kind === "run" ? {} : { [kind]: rest.join(":") }); };
    element.append(el("div", { class: "row" },
      picker("run", all.runs.map((r) => [r.key, `${r.key.slice(0, 8)} ${r.task}`]), key, (value) => go(fresh({ tab: "circuits", run: value }))),
      picker("edges of", [...choices, ...(what.startsWith("sequence:") ? [[what, "one sequence"]] : [])], what, choose),
      picker("one sequence", [["", "–"], ...sequences], what.startsWith("sequence:") ? what : "", (value) => (value ? choose(value) : change({})))));
    const sequence = now.sequence ? run.sequences.find((s) => s.key === now.sequence) : null;
    if (sequence) element.append(el("p", {}, el("span", { class: "soft" }, "clean "), sequence.clean, el("b", {}, sequence.answer), el("span", { class: "soft" }, "   corrupted "), sequence.corrupt, el("span", { class: "soft" }, `   ${run.metric} ${signed(sequence.metric_clean)} clean, ${signed(sequence.metric_corrupt)} corrupted`)));

    const parameters = now.circuit ? { circuit: named ? named.key : now.circuit } : { run: key, sequence: now.sequence, task: now.task, ...(atlas.alive ? { edges: now.edges, threshold: now.least, by: now.by } : {}) };
    const page = await stored(parameters);
    let drawing = null;
    if (atlas.alive && !now.circuit) element.append(cutAnew(now));
    if (page.error) element.append(el("p", { class: "warn" }, page.error.message));
    else drawing = circuitView(element, page, now);
    const rest = el("div", {});
    element.append(rest);
    runParts(rest, run);
    const relight = (event) => { if (drawing) drawing.select(event.detail); };
    const search = (event) => { if (drawing) drawing.match(event.detail); };
    document.addEventListener("featlas-feature", relight);
    document.addEventListener("featlas-search", search);
    return { shown: () => drawing && drawing.resize() };
  };

  // Only where a server cuts: other edges than those that the slider chooses among.
  const cutAnew = (now) => {
    const edges = el("input", { type: "number", min: 1, max: 20000, step: 1, id: "cut-edges", value: now.edges || (now.least ? "" : 5000), style: { width: "92px" } });
    const least = el("input", { type: "number", min: 0, step: "any", id: "cut-least", value: now.least || "", style: { width: "104px" } });
    const by = el("select", { id: "cut-by" }, [["abs_weight", "mean of |effect|"], ["weight", "|mean effect|"]].map(([value, text]) => el("option", { value, selected: (now.by || "abs_weight") === value }, text)));
    const cut = (changes) => go({ edges: edges.value || null, least: least.value || null, by: by.value, threshold: null, ...changes });
    edges.addEventListener("change", () => cut({ least: null }));
    least.addEventListener("change", () => cut(least.value ? { edges: null } : {}));
    by.addEventListener("change", () => cut({}));
    return el("div", { class: "row", id: "cut" }, el("span", { class: "soft small" }, "Cut anew from all edges:"), el("label", {}, "the strongest", edges), el("label", {}, "or all of at least", least), el("label", {}, "by", by));
  };

  const circuitView = (element, page, now) => {
    if (!page.edges.length) {
      element.append(el("p", { class: "warn" }, `No way leads from an input to the output along these ${number(page.settings.n_candidates)} edges.`));
      return null;
    }
    const strengths = page.edges.map((edge) => edge[3]).filter((value) => value > 0).sort((a, b) => b - a);
    const strongest = strengths[0] || 1, weakest = strengths[strengths.length - 1] || strongest;
    const first = now.threshold ? Number(now.threshold) : page.settings.circuit || strengths.length <= START ? weakest : strengths[START - 1];
    const span = Math.log(strongest / weakest) || 1;
    const slider = el("input", { type: "range", min: 0, max: 1000, step: 1, id: "threshold" }), box = el("input", { type: "number", step: "any", min: 0, id: "threshold-number", style: { width: "104px" } });
    slider.setAttribute("aria-label", "Least strength of an edge");
    box.setAttribute("aria-label", "Threshold");
    const counts = el("span", { class: "counts", id: "counts" }), host = el("div", { id: "circuit" }), flows = el("div", {});
    counts.setAttribute("aria-live", "polite");
    const left = page.settings.n_candidates - page.edges.length;
    const notes = [];
    if (left > 0) notes.push(`${number(page.edges.length)} of ${number(page.settings.n_candidates)} edges are here: those of strength ${number(page.settings.weakest)} or more that lie on a way from an input to the output.`);
    const show = (made) => {
      counts.replaceChildren(el("b", {}, number(made.n_nodes)), " nodes  ", el("b", {}, number(made.n_edges)), " edges  ", el("span", { class: "faint" }, made.n_edges ? `density ${number((2 * made.n_edges) / (made.n_nodes * (made.n_nodes - 1)))}, ${number(made.n_pruned)} pruned` : "no way to the output: lower it"));
      flows.replaceChildren(flow(page, made));
    };
    element.append(el("div", { class: "row" }, el("label", { class: "slider" }, "threshold", slider), box, counts, el("span", {}, "")));
    const controls = element.lastChild;
    element.append(host, el("div", { class: "legend" },
      el("span", {}, el("i", { style: { borderColor: "var(--up)" } }), `raises ${page.metric}`), el("span", {}, el("i", { style: { borderColor: "var(--down)" } }), "lowers it"),
      el("span", {}, "early", el("span", { class: "ramp", style: { background: `linear-gradient(90deg, ${RAMP.join(", ")})` } }), "late layers"),
      el("span", {}, "◆ error node: what the dictionary leaves unexplained"), el("span", {}, "★ output"), el("span", {}, "size: influence, the share of all that enters the output")));
    if (notes.length) element.append(el("p", { class: "soft small" }, notes.join(" ")));
    const drawing = drawGraph(host, page, { threshold: first, whole: page.settings.pruned, onCount: show, onNode: (node) => showFeature(node.key) });
    const settle = () => { slider.value = String(Math.round((1000 * Math.log(Math.max(value, weakest) / weakest)) / span)); box.value = String(Number(value.toPrecision(4))); };
    let value = first;
    settle();
    slider.addEventListener("input", () => { const at = Number(slider.value); value = at === 0 ? weakest : at === 1000 ? strongest : weakest * Math.exp((span * at) / 1000); box.value = String(Number(value.toPrecision(4))); drawing.setThreshold(value); });
    slider.addEventListener("change", () => drawing.fit(true));
    box.addEventListener("change", () => { const given = Number(box.value); if (!(given >= 0)) return; value = given; slider.value = String(Math.round((1000 * Math.log(Math.max(given, weakest) / weakest)) / span)); drawing.setThreshold(given); drawing.fit(true); });
    if (drawing.positioned) {
      const toggle = el("button", { class: "plain", type: "button", onclick: () => { const on = toggle.getAttribute("aria-pressed") !== "true"; toggle.setAttribute("aria-pressed", String(on)); drawing.setByPosition(on); } }, "by token position");
      toggle.setAttribute("aria-pressed", "true");
      controls.append(toggle);
    }
    element.append(el("h2", {}, "Where the effect flows"), flows);
    if (address().feature) drawing.select(address().feature);
    window.featlas.drawing = drawing;
    return drawing;
  };

  const runParts = (element, run) => {
    if (run.features.length) element.append(el("h2", {}, "Features with the most influence"), table(
      [{ name: "feature", node: (name, row) => el("b", { class: row[8] === "automatic" ? "rule" : "" }, shown(name)) }, "site", "index", { name: "influence", number: true, format: (v) => percent(v) }, { name: "effect out", number: true, node: (v) => el("span", { class: v >= 0 ? "up" : "down" }, signed(v)) }, { name: "in", number: true }, { name: "out", number: true }],
      run.features.map((f) => [f.name, f.site, f.index, f.influence, f.out_strength, f.n_in, f.n_out, f.key, f.label_kind]), { onRow: (row) => showFeature(row[7]) }));
    if (run.paths.length) element.append(el("h2", {}, "Strongest paths to the output"), el("p", { class: "soft" }, "A path's score is the product of its edges' shares: the part of everything entering the output that came this very way. Between two nodes stands the edge's weight: the effect on the metric, in its own units."),
      ...run.paths.map((path) => el("div", { class: "path" }, el("span", { class: "score" }, percent(path.score, 2)), path.nodes.map((node, i) => [nodeButton(node), i < path.weights.length ? el("span", { class: `small ${path.weights[i] >= 0 ? "up" : "down"}` }, `${signed(path.weights[i], 2)} →`) : null]))));
    element.append(el("h2", {}, "Does the model solve the task?"), table(
      ["task", "pairs", { name: "answer preferred", number: true, format: (v) => percent(v, 0) }, { name: `${run.metric}, clean`, number: true, format: (v) => signed(v) }, { name: "corrupted", number: true, format: (v) => signed(v) }], run.tasks.rows, { wide: false }));
    if (run.sequences.length) element.append(el("details", {}, el("summary", {}, `${number(run.sequences.length)} sequences`), table(
      ["task", "clean", "answer", "corrupt", "wrong_answer", { name: "clean metric", number: true, format: (v) => signed(v) }, { name: "corrupt metric", number: true, format: (v) => signed(v) }, "edges"],
      run.sequences.map((s) => [s.task, s.clean, s.answer, s.corrupt, s.wrong_answer, s.metric_clean, s.metric_corrupt, s.n_edges, s.key]), { onRow: (row) => go(fresh({ tab: "circuits", run: run.key, sequence: row[8] })) })));
    element.append(el("h2", {}, "Settings of the run"), settings(run.settings), el("h2", {}, "Next"), el("pre", {}, run.commands.join("\n")));
  };

  // --- features --------------------------------------------------------------------------------------------------------

  const features = async (element) => {
    const { table: data, n_dead: dead } = await atlas.get("features");
    const at = Object.fromEntries(data.columns.map((name, i) => [name, i])), sites = [...new Set(data.rows.map((row) => row[at.site]))], models = [...new Set(data.rows.map((row) => row[at.model]))];
    const wanted = ["name", "label_kind", "site", "layer", "kind", "index", "frequency", "mean_active", "maximum"];
    const formats = { frequency: { number: true, format: (v) => percent(v, 2) }, mean_active: { number: true }, maximum: { number: true }, name: { node: (v, row) => el("b", { class: row[1] === "automatic" ? "rule" : "" }, shown(v)) }, label_kind: { title: "label", format: (v) => v || "" } };
    const shownColumns = models.length > 1 ? [...wanted, "model"] : wanted;
    const rows = data.rows.map((row) => [...shownColumns.map((name) => row[at[name]]), row[at.key]]);
    const made = table(shownColumns.map((name) => ({ name, ...(formats[name] || {}) })), rows, { onRow: (row) => showFeature(row[row.length - 1]), page: 150, sort: [shownColumns.indexOf("frequency"), true] });
    made.style.maxHeight = "calc(100vh - 250px)";
    const box = el("input", { type: "search", placeholder: "Filter by name", id: "filter", oninput: () => filter() }), count = el("span", { class: "counts" });
    const site = el("select", { onchange: () => filter() }, el("option", { value: "" }, "all sites"), sites.map((name) => el("option", { value: name }, name)));
    const filter = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean), s = shownColumns.indexOf("site"), i = shownColumns.indexOf("index");
      const n = made.filter((row) => (!site.value || row[s] === site.value) && words.every((word) => `${row[0]} ${row[s]}/${row[i]}`.toLowerCase().includes(word)));
      count.textContent = `${number(n)} of ${number(rows.length)}`;
    };
    element.append(...head("Features", `${number(rows.length)} nodes that are ever active or were measured${dead ? `; ${number(dead)} features that never were are left out` : ""}`).filter(Boolean), el("div", { class: "row" }, box, site, count), made);
    filter();
  };

  // --- sweeps ----------------------------------------------------------------------------------------------------------

  const faithfulness = async (element, now) => {
    const { sweeps } = await atlas.get("overview");
    const chosen = sweeps.find((sweep) => sweep.subject === now.subject && (!now.baseline || sweep.baseline === now.baseline)) || sweeps[0];
    const page = await atlas.get("sweep", { subject: chosen.subject, baseline: chosen.baseline });
    element.append(...head(`Faithfulness: ${chosen.tasks.join(", ")}`, `${page.model} · run ${page.run} · baseline ${page.baseline} · ${number(chosen.n_sequences)} ${page.split} sequences · ${chosen.n_sizes} sizes`).filter(Boolean),
      el("div", { class: "row" }, picker("sweep", sweeps.map((sweep) => [`${sweep.subject}\n${sweep.baseline}`, `${sweep.tasks.join(", ")}, ${sweep.baseline}, ${sweep.subject.slice(0, 8)}…${sweep.subject.slice(-6)}`]), `${chosen.subject}\n${chosen.baseline}`, (value) => { const [subject, baseline] = value.split("\n"); go(fresh({ tab: "faithfulness", subject, baseline })); })),
      ...page.exhibits.map(exhibit));
  };

  // --- regions ---------------------------------------------------------------------------------------------------------

  const members = async (keys, limit = 400) => {
    const names = await featureNames().catch(() => new Map());
    const chips = keys.slice(0, limit).map((key) => { const known = names.get(key); return el("button", { class: "chip", type: "button", onclick: () => showFeature(key) }, known ? `${shown(known.name)}  ${known.site}/${known.kind === "feature" ? known.index : known.kind}` : key); });
    return el("div", {}, chips, keys.length > limit ? el("span", { class: "soft small" }, ` and ${number(keys.length - limit)} more`) : null);
  };

  const blockDetails = async (host, block, title) => {
    host.replaceChildren(el("h3", {}, title),
      block.contexts && block.contexts.length ? el("div", { class: "small soft" }, block.contexts.map((text) => el("div", {}, shown(text)))) : null ?? "",
      await members(block.members));
    host.hidden = false;
  };

  const regions = async (element, now) => {
    const { parcellations } = await atlas.get("overview");
    const chosen = parcellations.find((p) => p.key === now.partition) || parcellations[0];
    const page = await atlas.get("region", { parcellation: chosen.key });
    element.append(...head(`Regions of ${String(page.model).split("@")[0]}`, `sets of features of a site that are active together: ${page.method} of ${page.basis}s, parcellation ${page.key}`).filter(Boolean),
      el("div", { class: "row" }, picker("parcellation", parcellations.map((p) => [p.key, `${p.method} of ${p.basis}s, ${p.key.slice(0, 8)}`]), chosen.key, (value) => go(fresh({ tab: "regions", partition: value })))));
    if (page.findings.length && !page.exhibits.length) element.append(el("ul", { class: "findings" }, page.findings.map((text) => el("li", {}, text))));
    const details = el("div", { hidden: true, id: "block" });
    const live = page.blocks.filter((block) => block.kind !== "dead"), dead = page.blocks.filter((block) => block.kind === "dead");
    const number3 = { number: true, format: (v) => (v === null ? "–" : v.toFixed(3).replace("-", "−")) }, share = { number: true, format: (v) => (v === null ? "–" : percent(v, 0)) };
    const name = (block) => `${block.site}/${block.index}`;
    const open = (block) => blockDetails(details, block, `${name(block)}: ${shown(block.label || "")}, ${number(block.size)} features`);
    element.append(el("h2", {}, `${number(live.length)} regions`), el("p", { class: "soft" }, "r inside and outside: mean correlation over pairs of a region's features, and of one of its features and another. Click a region for its features."),
      table([{ name: "region", node: (v) => el("b", {}, v) }, "features", "label", { name: "r inside", ...number3 }, { name: "outside", ...number3 }, { name: "cosine inside", ...number3 }, { name: "active", number: true, format: (v) => percent(v) }, "most active in", { name: "share", ...share }, "most attributed to", { name: "attributed", title: "share", ...share }],
        live.map((b) => [name(b), b.size, b.label, b.mean_correlation, b.mean_correlation_outside, b.mean_cosine, b.frequency, b.task, b.task_share, b.attributed_task, b.attributed_share, b.key]), { onRow: (row) => go({ block: row[11] }) }), details);
    if (dead.length) element.append(el("p", { class: "soft small" }, `Left out as never or hardly active: ${dead.map((b) => `${number(b.size)} of ${b.site}`).join(", ")}.`));
    if (page.losses) element.append(el("h2", {}, "Which region breaks which task"), figure(page.losses, "region-losses"));
    element.append(...page.exhibits.map(exhibit));
    if (page.drives.rows.length) element.append(el("h2", {}, "What regions drive each other"), frame(page.drives));
    const chosenBlock = (place) => { const block = page.blocks.find((b) => b.key === place.block); if (block) open(block).then(() => details.scrollIntoView({ block: "nearest", behavior: "smooth" })); else details.hidden = true; };
    if (now.block) chosenBlock(now);
    return { update: (next) => { if ((next.partition || parcellations[0].key) !== chosen.key || (next.tab && next.tab !== "regions")) return false; chosenBlock(next); return true; } };
  };

  // --- communities -----------------------------------------------------------------------------------------------------

  const heat = (page) => {
    const blocks = page.blocks.filter((block) => block.size > 1).slice(0, 16), at = new Map(blocks.map((block, i) => [block.key, i])), grid = blocks.map(() => blocks.map(() => 0));
    for (const [from, to, , , strength] of page.flows) if (at.has(from) && at.has(to)) grid[at.get(from)][at.get(to)] = strength;
    const most = Math.max(...grid.flat(), 1e-12);
    return el("div", { class: "across" }, el("table", { class: "heat" }, el("thead", {}, el("tr", {}, el("th", {}, "from ↓  to →"), blocks.map((block) => el("th", {}, String(block.index))))), el("tbody", {}, grid.map((row, i) => el("tr", {}, el("th", { title: blocks[i].label }, String(blocks[i].index)), row.map((value) => el("td", { style: { background: `color-mix(in srgb, var(--up) ${Math.round(70 * Math.sqrt(value / most))}%, transparent)` } }, value ? number(value, 2) : "")))))));
  };

  const communities = async (element, now) => {
    const { communities: every } = await atlas.get("overview");
    const chosen = every.find((c) => c.parcellation === now.partition) || every[0];
    const page = await atlas.get("community", { parcellation: chosen.parcellation });
    element.append(...head("Communities", `${page.method}, run ${page.run}, ${page.key}`).filter(Boolean),
      el("div", { class: "row" }, picker("division", every.map((c) => [c.parcellation, `${c.method}, run ${String(c.run).slice(0, 8)}, ${c.parcellation.slice(0, 8)}`]), chosen.parcellation, (value) => go(fresh({ tab: "communities", partition: value })))));
    const notes = page.notes, facts = [["communities", page.blocks.length], ["modularity", notes.modularity], ["z against rewired graphs", notes.z], ["p", notes.p], ["AMI with sites", notes.ami_site], ["AMI with tasks", notes.ami_task]].filter(([, value]) => value !== null && value !== undefined);
    element.append(el("div", { class: "numbers" }, facts.map(([name, value]) => el("div", {}, el("b", {}, number(value)), name))), el("p", { class: "soft" }, page.settings.graph || ""));
    const details = el("div", { hidden: true, id: "block" });
    const open = (block) => blockDetails(details, block, `Community ${block.index}: ${shown(block.label || "")}, ${number(block.size)} nodes`);
    element.append(table([{ name: "community", number: true }, "nodes", "label", "task", { name: "share", number: true, format: (v) => percent(v, 0) }, { name: "sites", node: (v) => el("span", { class: "soft" }, v.map(([site, n]) => `${site} ${n}`).join(", ")) }],
      page.blocks.map((b) => [b.index, b.size, b.label, b.task, b.task_share, b.sites, b.key]), { onRow: (row) => go({ block: row[6] }) }), details);
    element.append(el("h2", {}, "What communities send to one another"), el("p", { class: "soft" }, "Summed magnitude of the run's edges from the row's community to the column's; on the diagonal those inside."), heat(page));
    element.append(...page.exhibits.map(exhibit));
    const chosenBlock = (place) => { const block = page.blocks.find((b) => b.key === place.block); if (block) open(block).then(() => details.scrollIntoView({ block: "nearest", behavior: "smooth" })); else details.hidden = true; };
    if (now.block) chosenBlock(now);
    return { update: (next) => { if ((next.partition || every[0].parcellation) !== chosen.parcellation || (next.tab && next.tab !== "communities")) return false; chosenBlock(next); return true; } };
  };

  // --- matchings and comparisons ---------------------------------------------------------------------------------------

  const matching = async (element, now) => {
    const { matchings } = await atlas.get("overview");
    const chosen = matchings.find((m) => m.matching === now.matching) || matchings[0], page = await atlas.get("matching", { matching: chosen.matching });
    element.append(...head("Matching of features", `${page.model_a} (A) and ${page.model_b} (B) on ${page.source}`).filter(Boolean),
      el("div", { class: "row" }, picker("matching", matchings.map((m) => [m.matching, `${m.model_a} and ${m.model_b}, ${m.matching.slice(0, 8)}`]), chosen.matching, (value) => go(fresh({ tab: "matching", matching: value })))),
      el("div", { class: "numbers" }, [["live in A", page.n_a], ["live in B", page.n_b], ["mutual nearest", page.n_mutual], ["matched", page.n_matched], ["share of A", percent(page.share_a)], ["share of B", percent(page.share_b)], ["share by chance", percent(page.null_share)], ["threshold r", number(page.threshold)]].map(([name, value]) => el("div", {}, el("b", {}, typeof value === "number" ? number(value) : value), name))),
      el("h2", {}, "Pairs of sites"), frame(page.sites), el("h2", {}, `The best of ${number(page.n_pairs)} pairs`));
    const at = Object.fromEntries(page.pairs.columns.map((name, i) => [name, i])), end = (side) => ({ name: side, node: (v, row) => nodeButton({ key: row[5 + (side === "A" ? 0 : 1)], site: v[1] }, v[0]) });
    element.append(table([end("A"), end("B"), { name: "r", number: true }, "method", "mutual"], page.pairs.rows.map((row) => [[row[at.source_name] || row[at.source], row[at.site_a]], [row[at.target_name] || row[at.target], row[at.site_b]], row[at.score], row[at.method], row[at.mutual] ? "yes" : "no", row[at.source], row[at.target]])));
  };

  const comparisons = async (element, now) => {
    const { comparisons: every } = await atlas.get("overview");
    const chosen = every.find((c) => c.comparison === now.comparison) || every[0], page = await atlas.get("comparison", { comparison: chosen.comparison });
    element.append(...head(page.kind === "joint" ? "Joint partitions" : "Two graphs compared", `A: ${page.a}`).filter(Boolean), el("div", { class: "soft" }, `B: ${page.b}`),
      el("div", { class: "row" }, picker("comparison", every.map((c) => [c.comparison, `${c.a} and ${c.b}, ${c.comparison.slice(0, 8)}`]), chosen.comparison, (value) => go(fresh({ tab: "comparisons", comparison: value })))));
    element.append(...page.exhibits.map(exhibit));
    const titles = { values: "Every number beside its null", links: "What corresponds to what", blocks: "Blocks of both" };
    for (const [title, data] of page.tables) element.append(el("h2", {}, titles[title] || title), frame(data));
    const rows = Object.entries(page.settings).map(([name, value]) => [name, plain(value)]).filter(([, value]) => value !== null);
    if (rows.length) element.append(el("h2", {}, "Settings"), settings(rows));
  };

  // --- series of models ------------------------------------------------------------------------------------------------

  const series = async (element, now) => {
    const { series: every } = await atlas.get("overview");
    const chosen = every.find((s) => s.series === now.series) || every[0], page = await atlas.get("series", { series: chosen.series });
    element.append(...head(page.title, `${page.members.rows.length} models by ${page.axis}`).filter(Boolean),
      el("div", { class: "row" }, picker("series", every.map((s) => [s.series, `${s.title}, ${s.series.slice(0, 8)}`]), chosen.series, (value) => go(fresh({ tab: "series", series: value })))));
    element.append(...page.exhibits.map(exhibit), el("h2", {}, "Models"), frame(page.members));
    const rows = Object.entries(page.settings).map(([name, value]) => [name, plain(value)]).filter(([, value]) => value !== null);
    if (rows.length) element.append(el("h2", {}, "Settings"), settings(rows));
  };

  // --- all of them -----------------------------------------------------------------------------------------------------

  const begin = async () => {
    let all;
    try { all = await atlas.get("overview"); } catch (error) { document.getElementById("main").append(el("p", { class: "warn" }, error.message)); throw error; }
    document.getElementById("brand").textContent = all.atlas;
    const tabs = [
      ["Overview", overview, true], ["Circuits", circuits, all.runs.length], ["Features", features, all.counts.Feature], ["Faithfulness", faithfulness, all.sweeps.length],
      ["Regions", regions, all.parcellations.length], ["Communities", communities, all.communities.length], ["Matching", matching, all.matchings.length],
      ["Comparisons", comparisons, all.comparisons.length], ["Series", series, all.series.length],
    ];
    tabs.forEach(([name, render, there], order) => { if (there) addTab(name, render, { order }); });
    await window.featlas.start();
  };
  begin();
})();
