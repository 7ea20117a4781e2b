// What is known of one feature, beside whatever tab is open. Everything in it that is a feature leads on to that feature.
(() => {
  "use strict";
  const { atlas, el, number, signed, percent, shown, go, showFeature } = window.featlas;
  const panel = document.getElementById("panel");
  const KINDS = { hand: "label by hand", file: "label from a file", neuronpedia: "label of Neuronpedia", automatic: "automatic label" };
  let open = null;

  const context = (made, most) => {
    const tokens = [...made.before, made.token, ...made.after], marked = made.before.length;
    const token = (text, i) => {
      const value = made.values ? made.values[i] : i === marked ? made.value : null;
      const glow = value && most ? Math.min(Math.abs(value) / most, 1) : 0;
      const properties = { class: "lit", title: value === null || value === undefined ? "" : number(value), style: glow > 0.02 ? { background: `rgba(${getComputedStyle(document.documentElement).getPropertyValue("--glow")}, ${(0.08 + 0.55 * glow).toFixed(2)})` } : {} };
      const visible = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/[\u2028\u2029]/g, "⏎");
      return el(i === marked ? "mark" : "span", properties, visible);
    };
    return el("div", { class: "context" }, el("span", { class: "value" }, number(made.value)), el("p", {}, tokens.map(token)));
  };

  const edges = (title, rows) => {
    if (!rows.length) return null;
    const runs = [...new Set(rows.map((row) => row.run))];
    return [el("h3", {}, title), runs.map((run) => {
      const own = rows.filter((row) => row.run === run), most = Math.max(...own.map((row) => Math.abs(row.weight)), 1e-12);
      return [
        runs.length > 1 ? el("div", { class: "soft small" }, `run ${run}`) : null,
        el("div", { class: "edges" }, own.map((row) => [
          el("button", { type: "button", title: `${shown(row.name)} (${row.site})`, onclick: () => showFeature(row.key) }, shown(row.name), el("span", { class: "faint small" }, `  ${row.site}`)),
          el("span", { class: "bar", title: `mean magnitude ${number(row.abs_weight)}, in ${row.n} sequences`, style: { width: `${Math.max((100 * Math.abs(row.weight)) / most, 2)}%`, background: row.weight >= 0 ? "var(--up)" : "var(--down)" } }),
          el("span", { class: `w ${row.weight >= 0 ? "up" : "down"}` }, signed(row.weight)),
        ])),
        own.length > 1 ? el("div", { class: "faint small" }, `${own[0].of > own.length ? `the ${own.length} strongest of ${number(own[0].of)}, ` : ""}in the order of the mean magnitude; the figure is the mean`) : null,
      ];
    })];
  };

  const list = (title, rows, line) => (rows.length ? [el("h3", {}, title), el("ul", { class: "list" }, rows.map((row) => el("li", {}, line(row))))] : null);
  const jump = (changes, text) => el("button", { type: "button", onclick: () => go({ run: null, circuit: null, sequence: null, block: null, partition: null, ...changes }) }, text);

  const facts = (page) => {
    const s = page.statistics;
    const said = s ? [["active at", percent(s.frequency, 2)], ["greatest", number(s.maximum)], ["mean where active", number(s.mean_active)], ["mean", number(s.mean)], ["tokens", number(s.tokens)], ["times active", number(s.count)]] : page.frequency !== null ? [["active at", percent(page.frequency, 2)], ["mean", number(page.mean_activation)]] : [];
    return said.length ? [el("div", { class: "facts" }, said.map(([name, value]) => el("div", {}, el("span", {}, `${name} `), value))), s ? el("div", { class: "faint small" }, `measured on ${s.corpus}`) : null] : null;
  };

  const head = (page) => [
    el("div", { class: "soft small" }, [page.site, page.kind === "feature" ? `feature ${page.index}` : page.kind === "error" ? "error node: what the dictionary leaves unexplained" : "the output", page.model].join(" · ")),
    el("h2", { class: page.label_kind === "automatic" ? "rule" : "" }, shown(page.name || page.key)),
    page.label_kind ? el("span", { class: "chip" }, KINDS[page.label_kind] || page.label_kind) : null,
    facts(page),
  ];

  const body = (page) => {
    const most = Math.max(...page.contexts.map((made) => Math.max(Math.abs(made.value), ...(made.values || []).map(Math.abs))), 0);
    return [
      list("Labels", page.labels, (row) => [el("b", {}, shown(row.label)), ` · ${KINDS[row.kind] || row.kind}${row.rule ? `, ${row.rule}` : ""}${row.source ? ` (${row.source})` : ""}`, row.evidence ? el("div", { class: "faint" }, row.evidence) : null]),
      page.contexts.length ? [el("h3", {}, "Strongest contexts"), page.contexts.map((made) => context(made, most))] : null,
      edges("What drives it", page.inputs),
      edges("What it drives", page.outputs),
      list("Effect of ablating it alone", page.effects, (row) => `${signed(row.effect)} ${row.metric} (${row.baseline} baseline, ${row.n} sequences, run ${row.run})`),
      list("Matches", page.matches, (row) => [el("button", { type: "button", onclick: () => showFeature(row.other) }, shown(row.name || row.other)), ` ${row.site || ""} of ${row.model || ""} · r ${number(row.score)} · ${row.method}`]),
      list("Circuits", page.circuits, (row) => [jump({ tab: "circuits", circuit: row.circuit }, row.circuit.slice(0, 8)), ` ${row.role || ""} · ${number(row.n_edges)} edges · ${row.description || ""}`]),
      list("Regions", page.regions, (row) => [jump({ tab: "regions", partition: row.parcellation, block: row.block }, row.label ? shown(row.label) : `${row.kind} ${row.index}`), ` ${row.site}, ${number(row.size)} features`]),
      list("Communities", page.communities, (row) => [jump({ tab: "communities", partition: row.parcellation, block: row.block }, `community ${row.index}`), ` ${shown(row.label || "")}, ${number(row.size)} nodes`]),
      el("h3", {}, "Key"), el("div", { class: "key" }, page.key),
    ];
  };

  window.featlas.panel = async (key) => {
    if (key === open) return;
    open = key;
    document.body.classList.toggle("open", Boolean(key));
    document.dispatchEvent(new CustomEvent("featlas-feature", { detail: key }));
    if (!key) { panel.hidden = true; panel.replaceChildren(); return; }
    const close = el("button", { class: "close", type: "button", title: "Close (Esc)", onclick: () => go({ feature: null }) }, "×");
    close.setAttribute("aria-label", "Close");
    let made;
    try {
      const page = await atlas.get("feature", { key });
      made = [head(page), body(page)];
    } catch (error) {
      const known = await window.featlas.featureNames().then((names) => names.get(key)).catch(() => null);
      made = [known ? [el("div", { class: "soft small" }, `${known.site} · ${known.kind} ${known.index}`), el("h2", {}, shown(known.name))] : el("h2", {}, "Unknown feature"), el("p", { class: "warn" }, error.message), el("div", { class: "key" }, key)];
    }
    if (open !== key) return;
    panel.replaceChildren(close, ...made.flat(Infinity).filter(Boolean));
    panel.hidden = false;
    panel.scrollTop = 0;
  };
})();
