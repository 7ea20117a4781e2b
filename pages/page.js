// The page: where its contents come from, how they are put on it, tabs, addresses, tables. Sections and the drawing stand in files of their own.
// Everything that comes from an atlas is put on the page as text (textContent): none of it is ever read as HTML.
(() => {
  "use strict";

  // --- contents: embedded in a report, fetched from a server ---------------------------------------------------------------

  const query = (parameters) => {
    const given = Object.entries(parameters || {}).filter(([, value]) => value !== undefined && value !== null && value !== "");
    return new URLSearchParams(given.map(([name, value]) => [name, String(value)]).sort()).toString();
  };

  const unpacked = async () => {
    const plain = document.getElementById("atlas-data");
    if (plain) return JSON.parse(plain.textContent);
    const packed = document.getElementById("atlas-data-gzip");
    if (!packed) return null;
    const bytes = Uint8Array.from(atob(packed.textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  class Absent extends Error {}

  // What a report can look for is what its table of features says of them.
  const searched = async (text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return { text, found: [] };
    const { columns, rows } = (await get("features")).table;
    const at = Object.fromEntries(columns.map((name, i) => [name, i]));
    const scored = [];
    for (const row of rows) {
      const name = String(row[at.name] ?? "").toLowerCase(), place = `${row[at.site]}/${row[at.index]}`.toLowerCase();
      const whole = `${name} ${place} ${String(row[at.key]).toLowerCase()}`;
      if (!words.every((word) => whole.includes(word))) continue;
      const exact = name === text.toLowerCase() || place === text.toLowerCase() ? 2 : words.every((word) => name.includes(word)) ? 1 : 0;
      scored.push([exact, row]);
    }
    scored.sort((a, b) => b[0] - a[0]);
    return { text, found: scored.slice(0, 50).map(([, row]) => Object.fromEntries(columns.map((name, i) => [name, row[i]]))) };
  };

  const server = window.featlasServer || null;
  const embedded = server ? Promise.resolve(null) : unpacked();
  const known = new Map();

  const fetched = async (name, address) => {
    const headers = server.token ? { authorization: `Bearer ${server.token}` } : {};
    const response = await fetch(`api/${name}${address ? `?${address}` : ""}`, { headers, credentials: "same-origin" });
    const said = await response.json().catch(() => ({}));
    if (!response.ok) throw new Absent(said.error || `the server answered ${response.status}`);
    return said;
  };

  const asked = async (name, parameters) => {
    const address = query(parameters);
    if (server) return fetched(name, address);
    if (name === "search") return searched(String((parameters || {}).text || ""));
    const data = await embedded, page = data.pages[name + (address ? `?${address}` : "")];
    if (page === undefined) throw new Absent(`This report holds no more of it. \`featlas serve\` shows all of an atlas.`);
    return page;
  };

  const get = (name, parameters) => {
    const key = `${name}?${query(parameters)}`;
    if (!known.has(key)) {
      const answer = asked(name, parameters);
      known.set(key, answer);
      answer.catch(() => known.delete(key));
      if (known.size > 400) known.delete(known.keys().next().value);
    }
    return known.get(key);
  };

  const atlas = { get, alive: Boolean(server) };

  // --- elements --------------------------------------------------------------------------------------------------------

  const el = (tag, properties, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "class") element.className = value;
      else if (name === "style") Object.assign(element.style, value);
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name in element && name !== "list" && name !== "role") element[name] = value;
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  };

  const MINUS = "−";
  const number = (value, digits = 3) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US").replace("-", MINUS);
    const size = Math.abs(value);
    const text = size >= 1000 ? Math.round(value).toLocaleString("en-US") : size !== 0 && size < 1e-4 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
    return text.replace("-", MINUS);
  };
  const signed = (value, digits = 3) => (value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + number(value, digits));
  const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(value !== 0 && Math.abs(value) < 0.001 ? 2 : digits)} %`);
  const shown = (text) => {
    const line = String(text ?? "").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/[\u2028\u2029]/g, "⏎");
    return line.trim() || line.replace(/ /g, "␣");
  };

  // --- tables ----------------------------------------------------------------------------------------------------------

  // columns: names, or {name, title, number, format(value, row), node(value, row), width}. rows: arrays. options: {onRow(row), page, wide, sort: [column, descending], caption}.
  const table = (columns, rows, options = {}) => {
    const made = columns.map((column) => (typeof column === "string" ? { name: column } : column));
    const numeric = made.map((column, i) => column.number ?? rows.slice(0, 50).some((row) => typeof row[i] === "number"));
    const page = options.page || 100;
    let order = rows.slice(), at = page, sorted = options.sort || null;
    const body = el("tbody"), more = el("button", { class: "plain", type: "button", onclick: () => { at += page * 5; draw(); } });
    const cell = (row, i) => {
      const column = made[i], value = row[i];
      if (column.node) return el("td", { class: numeric[i] ? "number" : "" }, column.node(value, row));
      const text = column.format ? column.format(value, row) : typeof value === "number" ? number(value, 4) : value === null || value === undefined ? "–" : Array.isArray(value) ? value.map((v) => number(v)).join(", ") : shown(value);
      return el("td", { class: numeric[i] ? "number" : "" }, text);
    };
    const draw = () => {
      body.replaceChildren(...order.slice(0, at).map((row) => {
        const line = el("tr", options.onRow ? { class: "go", tabIndex: 0, onclick: () => options.onRow(row), onkeydown: (e) => { if (e.key === "Enter") options.onRow(row); } } : {}, made.map((_, i) => cell(row, i)));
        return line;
      }));
      more.textContent = `more (${number(order.length - at)} left)`;
      more.hidden = order.length <= at;
    };
    const heads = made.map((column, i) => el("th", { class: `sortable${numeric[i] ? " number" : ""}`, title: column.help || "sort", scope: "col", onclick: () => { sorted = [i, sorted && sorted[0] === i ? !sorted[1] : numeric[i]]; sort(); draw(); } }, column.title ?? column.name.replace(/_/g, " ")));
    const sort = () => {
      if (!sorted) return;
      const [i, down] = sorted;
      heads.forEach((head, j) => (i === j ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
      const absent = (value) => value === null || value === undefined;
      order.sort((a, b) => {
        const [x, y] = [a[i], b[i]];
        if (absent(x) || absent(y)) return absent(x) - absent(y);
        const by = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return down ? -by : by;
      });
    };
    sort();
    draw();
    const element = el("div", { class: options.scroll === false ? "across" : "scroll" }, el("table", { class: options.wide === false ? "" : "wide" }, el("thead", {}, el("tr", {}, heads)), body), more);
    element.filter = (keep) => { order = rows.filter(keep); sort(); at = page; draw(); return order.length; };
    return element;
  };

  const frame = (data, options) => table(data.columns, data.rows, options);

  // --- figures ---------------------------------------------------------------------------------------------------------

  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], showSendToCloud: false, plotlyServerURL: "" };
  const figure = (made, id) => {
    const inner = el("div", id ? { id } : {}), outer = el("div", { class: "figure", style: { minHeight: `${(made.layout && made.layout.height) || 380}px` } }, inner);
    const draw = () => window.Plotly && window.Plotly.newPlot(inner, made.data, made.layout, CONFIG);
    if (!("IntersectionObserver" in window)) { setTimeout(draw); return outer; }
    const seen = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      seen.disconnect();
      draw();
    }, { rootMargin: "300px" });
    seen.observe(outer);
    return outer;
  };

  const exhibit = (made) => el("section", { class: "exhibit" },
    el("h2", {}, made.title),
    el("dl", {}, [["Question", made.question], ["Held fixed", made.fixed], ["How to read it", made.reading]].filter(([, text]) => text).map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])),
    made.findings.length ? el("ul", { class: "findings" }, made.findings.map((text) => el("li", {}, text))) : null,
    figure(made.figure),
    el("details", {}, el("summary", {}, `The numbers: ${number(made.n_rows)} rows`), frame(made.table, { wide: false })));

  // --- the address -----------------------------------------------------------------------------------------------------

  const address = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const go = (changes, replace = false) => {
    const now = { ...address(), ...changes };
    const hash = `#${query(now)}`;
    if (hash === location.hash) return;
    if (replace) { history.replaceState(null, "", hash); route(); } else location.hash = hash;
  };
  const link = (changes, ...children) => el("a", { href: `#${query(changes)}` }, ...children);

  // --- tabs ------------------------------------------------------------------------------------------------------------

  const tabs = new Map();
  let current = null;
  const addTab = (name, render, options = {}) => {
    const id = options.id || name.toLowerCase().replace(/[^a-z0-9]+/g, "-");
    const button = el("button", { type: "button", role: "tab", id: `tab-${id}`, onclick: () => go({ ...Object.fromEntries(Object.keys(address()).map((key) => [key, null])), tab: id, feature: address().feature }) }, name);
    button.setAttribute("aria-selected", "false");
    const order = options.order ?? 100 + tabs.size, later = [...tabs.values()].filter((tab) => tab.order > order).sort((a, b) => a.order - b.order)[0];
    tabs.set(id, { id, name, render, button, order, element: null, address: null });
    document.getElementById("tabs").insertBefore(button, later ? later.button : null);
    if (started && address().tab === id) route();
    return id;
  };

  // What a tab depends on: all of the address but the feature in the panel.
  const own = (now) => { const { feature, ...rest } = now; return query(rest); };

  let started = false;
  const route = async () => {
    if (!started) return;
    const now = address();
    if (now.tab === undefined && now.run !== undefined) now.tab = "circuits";
    const tab = tabs.get(now.tab) || tabs.get("overview") || tabs.values().next().value;
    const shownFeature = now.feature || null;
    if (featlas.panel) featlas.panel(shownFeature);
    if (!tab || (current === tab && tab.address === own(now))) return;
    for (const other of tabs.values()) other.button.setAttribute("aria-selected", String(other === tab));
    const main = document.getElementById("main"), kept = current === tab && tab.update;
    current = tab;
    if (kept && tab.update(now)) { tab.address = own(now); return; }
    if (tab.element && tab.address === own(now)) { main.replaceChildren(tab.element); if (tab.shown) tab.shown(); return; }
    tab.address = own(now);
    tab.update = tab.shown = null;
    const element = el("div", {});
    tab.element = element;
    main.replaceChildren(element);
    window.scrollTo(0, 0);
    try {
      const made = await tab.render(element, now);
      if (made) { tab.update = made.update; tab.shown = made.shown; }
    } catch (error) {
      element.append(el("p", { class: "warn" }, error.message));
      if (!(error instanceof Absent)) throw error;
    }
  };
  window.addEventListener("hashchange", route);

  const showFeature = (key) => go({ feature: key });

  // --- search and keys -------------------------------------------------------------------------------------------------

  const box = document.getElementById("search"), found = document.getElementById("found");
  let asking = 0, waiting = null, chosen = -1;
  const close = () => { found.hidden = true; chosen = -1; };
  const look = async () => {
    const text = box.value.trim(), mine = ++asking;
    document.dispatchEvent(new CustomEvent("featlas-search", { detail: text }));
    if (!text) { close(); return; }
    let hits = [], said = null;
    try { hits = (await get("search", { text })).found; } catch (error) { said = error.message; }
    if (mine !== asking) return;
    chosen = -1;
    found.replaceChildren(...(hits.length
      ? hits.map((hit) => el("button", { type: "button", class: "hit", onclick: () => { close(); showFeature(hit.key); } }, el("span", {}, shown(hit.name || hit.key)), el("span", { class: "soft small" }, hit.kind === "feature" ? `${hit.site} / ${hit.index}` : hit.site)))
      : [el("p", { class: "soft" }, said || `nothing is called “${text}”`)]));
    found.hidden = false;
  };
  const move = (step) => {
    const hits = [...found.querySelectorAll(".hit")];
    if (!hits.length) return;
    chosen = (chosen + step + hits.length) % hits.length;
    hits.forEach((hit, i) => hit.setAttribute("aria-selected", String(i === chosen)));
    hits[chosen].scrollIntoView({ block: "nearest" });
  };
  box.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(look, atlas.alive ? 180 : 60); });
  box.addEventListener("focus", () => { if (box.value.trim() && found.childElementCount) found.hidden = false; });
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); move(event.key === "ArrowDown" ? 1 : -1); }
    if (event.key === "Enter") { const hits = found.querySelectorAll(".hit"); if (hits.length) hits[Math.max(chosen, 0)].click(); }
  });
  document.addEventListener("click", (event) => { if (!event.target.closest("#finder")) close(); });
  document.addEventListener("keydown", (event) => {
    const typing = /^(input|textarea|select)$/i.test(event.target.tagName) || event.target.isContentEditable;
    if (event.key === "/" && !typing) { event.preventDefault(); box.focus(); box.select(); }
    if (event.key === "Escape" && (!typing || event.target === box)) {
      if (!found.hidden || box.value) { box.value = ""; asking++; close(); box.blur(); document.dispatchEvent(new CustomEvent("featlas-search", { detail: "" })); }
      else if (address().feature) go({ feature: null });
    }
  });

  // --- beginning -------------------------------------------------------------------------------------------------------

  // Names of all features, once: key -> {name, site, index, kind}.
  let names = null;
  const featureNames = () => {
    names = names || get("features").then(({ table: { columns, rows } }) => {
      const at = Object.fromEntries(columns.map((name, i) => [name, i]));
      return new Map(rows.map((row) => [row[at.key], { name: row[at.name], site: row[at.site], index: row[at.index], kind: row[at.kind] }]));
    });
    return names;
  };

  const start = async () => {
    if (started || !tabs.has("overview")) return;  // the sections say when they are there
    started = true;
    await route();
    document.body.dataset.ready = "true";
  };

  const featlas = { atlas, el, table, frame, figure, exhibit, number, signed, percent, shown, address, go, link, query, addTab, showFeature, featureNames, start, panel: null, Absent };
  window.featlas = featlas;
})();
