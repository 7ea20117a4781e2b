// The drawing of a layered graph: edges and nodes by Cytoscape.js on a canvas; names, rows, tokens and what lights up on canvases of our own above and
// below it, so that pointing at a node costs as much as it has edges.
(() => {
  "use strict";
  const { el, number, signed, percent, shown } = window.featlas;
  const ROW = 104, WIDTH = 1040, STEP = 15, CROWDED = 24, LINES = 9;
  const RAMP = ["#2c5d8f", "#2f8f9d", "#5aa469", "#c0a53a", "#c8743c"];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const mixed = (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2), t = at - i;
    const parts = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
    const [a, b] = [parts(RAMP[i]), parts(RAMP[i + 1])];
    return `rgb(${a.map((value, k) => Math.round(value + (b[k] - value) * t)).join(", ")})`;
  };

  // What is left of a circuit at a threshold: edges at least as strong that lie on a way from an input to an output; with each node's influence, the
  // share of all that enters the output which passes through it. nodes: {row, role}; edges: [source, target, weight, strength]. Ends are places in `nodes`.
  const prune = (nodes, edges, threshold, whole = true) => {
    const strong = [];
    for (let i = 0; i < edges.length; i++) if (edges[i][3] >= threshold && edges[i][3] > 0) strong.push(i);
    const forward = strong.slice().sort((a, b) => nodes[edges[a][0]].row - nodes[edges[b][0]].row);
    const backward = strong.slice().sort((a, b) => nodes[edges[b][1]].row - nodes[edges[a][1]].row);
    const from = new Uint8Array(nodes.length), to = new Uint8Array(nodes.length);
    nodes.forEach((node, i) => { from[i] = !whole || node.role === "input"; to[i] = !whole || node.role === "output"; });
    for (const e of forward) if (from[edges[e][0]]) from[edges[e][1]] = 1;
    for (const e of backward) if (to[edges[e][1]]) to[edges[e][0]] = 1;
    const kept = backward.filter((e) => from[edges[e][0]] && to[edges[e][1]]);
    const entering = new Float64Array(nodes.length), influence = new Float64Array(nodes.length), alive = new Uint8Array(nodes.length);
    for (const e of kept) { entering[edges[e][1]] += edges[e][3]; alive[edges[e][0]] = alive[edges[e][1]] = 1; }
    nodes.forEach((node, i) => { if (node.role === "output" && alive[i]) influence[i] = 1; });
    for (const e of kept) influence[edges[e][0]] += (edges[e][3] / entering[edges[e][1]]) * influence[edges[e][1]];
    return { kept, alive, influence, n_edges: kept.length, n_nodes: alive.reduce((n, on) => n + on, 0), n_strong: strong.length };
  };

  // Places in each row, by the weighted mean place of the neighbours (Sugiyama's barycentre heuristic), in some sweeps up and down.
  // `seed` are places to begin from, so that what is shown at two thresholds looks alike.
  const uncrossed = (nodes, edges, kept, alive, seed = null, sweeps = 8) => {
    const rows = new Map();
    nodes.forEach((node, i) => { if (alive[i]) { if (!rows.has(node.row)) rows.set(node.row, []); rows.get(node.row).push(i); } });
    const x = new Float64Array(nodes.length), near = nodes.map(() => []);
    for (const e of kept) { const [a, b, , s] = edges[e]; near[a].push([b, s]); near[b].push([a, s]); }
    const spread = (row) => { const n = row.length, step = Math.min(1 / Math.max(n - 1, 1), 1 / 9); row.forEach((node, i) => { x[node] = 0.5 + (i - (n - 1) / 2) * step; }); };
    if (seed) rows.forEach((row) => row.sort((a, b) => seed[a] - seed[b]));
    rows.forEach(spread);
    const order = [...rows.keys()].sort((a, b) => a - b);
    for (let sweep = 0; sweep < sweeps; sweep++) {
      for (const r of sweep % 2 ? order : order.slice().reverse()) {
        const row = rows.get(r), pull = new Map(row.map((i) => {
          let sum = 0, mass = 1e-12;
          for (const [j, s] of near[i]) { sum += s * x[j]; mass += s; }
          return [i, near[i].length ? sum / mass : x[i]];
        }));
        row.sort((a, b) => pull.get(a) - pull.get(b));
        spread(row);
      }
    }
    return { x, widest: Math.max(1, ...[...rows.values()].map((row) => row.length)), rows };
  };

  // data: {nodes: [{id, key, row, pos, kind, name, role, …}], edges: [[id, id, weight, strength]], sites, tokens}. options: {threshold, whole (prune to ways from
  // input to output), byPosition, onNode(node), onCount(counts)}. Returns what steers it.
  const drawGraph = (element, data, options = {}) => {
    const nodes = data.nodes.map((node, i) => ({ row: 0, pos: -1, kind: "feature", role: "inner", ...node, place: i }));
    const places = new Map(nodes.map((node, i) => [node.id, i]));
    const edges = data.edges.map(([a, b, weight, strength]) => [places.get(a), places.get(b), weight, strength ?? Math.abs(weight ?? 1)]);
    const sites = data.sites || [...new Set(nodes.map((node) => node.row))].sort((a, b) => a - b).map((row) => `${row}`);
    const positioned = nodes.some((node) => node.pos >= 0), roots = nodes.some((node) => node.role === "input");
    let byPosition = positioned && options.byPosition !== false, threshold = options.threshold ?? 0, state = null, hovered = null, chosen = null, matched = new Set(), frame = 0, gap = ROW, columnWidth = 74, touched = false;

    const under = el("canvas", { class: "under" }), host = el("div", {}), over = el("canvas", { class: "over" }), tip = el("div", { class: "tip", hidden: true });
    const fitButton = el("button", { class: "plain", type: "button", title: "Show all of it", onclick: () => fit(true) }, "fit");
    const tidyButton = el("button", { class: "plain", type: "button", title: "Arrange what is shown anew", onclick: () => { arrange(); fit(true); } }, "arrange");
    const save = el("button", { class: "plain", type: "button", title: "Save the drawing as a picture", onclick: () => picture() }, "save PNG");
    const stage = el("div", { class: "stage", tabIndex: 0, role: "application" }, under, host, over, tip, el("div", { class: "buttons" }, tidyButton, fitButton, save));
    stage.setAttribute("aria-label", "Drawing of the graph: drag to move, wheel to zoom, click a node");
    element.replaceChildren(stage);

    // On a logarithmic scale from the weakest edge to the strongest, so that a line says the same at every threshold.
    const sizes = edges.map((edge) => edge[3]).filter((value) => value > 0), least = sizes.reduce((a, b) => Math.min(a, b), Infinity), span = Math.log(sizes.reduce((a, b) => Math.max(a, b), 0) / least) || 1;
    const share = (strength) => (strength > 0 ? Math.log(strength / least) / span : 0);
    const width = (strength) => 0.7 + 6.3 * share(strength) ** 1.7;
    const opacity = (strength) => 0.25 + 0.5 * share(strength);
    const colourOf = (node) => (node.kind === "error" ? css("--faint") : node.kind === "output" ? "#e0a526" : node.colour || mixed(node.row / Math.max(sites.length - 2, 1)));

    const cy = window.cytoscape({
      container: host, layout: { name: "preset" }, pixelRatio: Math.min(window.devicePixelRatio || 1, 2), textureOnViewport: edges.length > 2500,
      minZoom: 0.05, maxZoom: 6, boxSelectionEnabled: false, autoungrabify: true,
      elements: [
        ...nodes.map((node) => ({ group: "nodes", data: { id: `n${node.place}`, place: node.place, size: 8 }, position: { x: 0, y: 0 }, classes: `${node.kind} off` })),
        ...edges.map(([a, b, weight, strength], i) => ({ group: "edges", data: { id: `e${i}`, source: `n${a}`, target: `n${b}`, width: width(strength), opacity: opacity(strength) }, classes: `${(weight ?? 1) >= 0 ? "up" : "down"} off`, selectable: false })),
      ],
      style: [
        { selector: "node", style: { width: "data(size)", height: "data(size)", "background-color": (n) => colourOf(nodes[n.data("place")]), "border-width": 1.2, "border-color": css("--paper"), "overlay-opacity": 0 } },
        { selector: "node.error", style: { shape: "diamond" } },
        { selector: "node.output", style: { shape: "star" } },
        { selector: "edge", style: { "curve-style": "haystack", "haystack-radius": 0, width: "data(width)", "line-opacity": "data(opacity)", "overlay-opacity": 0, events: "no" } },
        { selector: "edge.up", style: { "line-color": css("--up") } },
        { selector: "edge.down", style: { "line-color": css("--down") } },
        { selector: ".off", style: { display: "none" } },
      ],
    });
    const cyNodes = nodes.map((node) => cy.getElementById(`n${node.place}`)), cyEdges = edges.map((_, i) => cy.getElementById(`e${i}`));
    let onNodes = new Uint8Array(nodes.length), onEdges = new Uint8Array(edges.length);

    // -- what is shown, and where

    const everything = prune(nodes, edges, 0, options.whole !== false && roots);
    const seed = uncrossed(nodes, edges, everything.kept, everything.alive).x;
    const place = () => {
      const { x, rows } = uncrossed(nodes, edges, state.kept, state.alive, seed, 4);
      // A crowded row stands in several lines; of the nodes of a column the most influential stands lowest, where its name has room.
      const lines = (row) => (row.length > CROWDED ? Math.min(Math.max(3, Math.ceil(row.length / 40)), LINES) : 1);
      let most = 1, widest = 1;
      rows.forEach((row) => {
        const n = lines(row);
        most = Math.max(most, n);
        widest = Math.max(widest, Math.ceil(row.length / n));
        for (let i = 0; i < row.length; i += n) {
          const column = row.slice(i, i + n).sort((a, b) => state.influence[b] - state.influence[a]);
          column.forEach((node, rank) => { nodes[node].dy = ((n - 1) / 2 - rank) * 16; });
        }
      });
      gap = ROW + Math.max(most - 3, 0) * 15;
      const breadth = Math.max(WIDTH, widest * STEP, (sites.length - 1) * gap * 1.6);
      if (byPosition) {
        const cells = new Map();
        nodes.forEach((node, i) => { if (state.alive[i]) { const cell = `${node.row}@${node.pos}`; if (!cells.has(cell)) cells.set(cell, []); cells.get(cell).push(i); } });
        const last = Math.max(...nodes.map((node) => node.pos), 1), column = Math.max(WIDTH / (last + 1), 74);
        for (const cell of cells.values()) {
          cell.sort((a, b) => state.influence[b] - state.influence[a]);
          const across = Math.max(Math.min(cell.length, 4), 1);
          cell.forEach((i, k) => { nodes[i].x = (nodes[i].pos + ((k % across) - (across - 1) / 2) * 0.8 / Math.max(across, 3)) * column; nodes[i].dy = -Math.floor(k / across) * 15; });
        }
        columnWidth = column;
      } else nodes.forEach((node, i) => { if (state.alive[i]) node.x = (x[i] - 0.5) * breadth; });
      nodes.forEach((node) => { node.y = -node.row * gap + (node.dy || 0); });
    };

    const arrange = () => {
      place();
      cy.batch(() => nodes.forEach((node, i) => { if (state.alive[i]) cyNodes[i].position({ x: node.x, y: node.y }); }));
      later();
    };

    const apply = () => {
      state = prune(nodes, edges, threshold, options.whole !== false && roots);
      const now = new Uint8Array(edges.length);
      for (const e of state.kept) now[e] = 1;
      cy.batch(() => {
        for (let i = 0; i < nodes.length; i++) {
          if (onNodes[i] !== state.alive[i]) cyNodes[i].toggleClass("off", !state.alive[i]);
          if (state.alive[i]) cyNodes[i].data("size", nodes[i].kind === "output" ? 26 : 8 + 22 * Math.sqrt(Math.min(state.influence[i], 1)));
        }
        for (let i = 0; i < edges.length; i++) if (onEdges[i] !== now[i]) cyEdges[i].toggleClass("off", !now[i]);
      });
      onNodes = state.alive;
      onEdges = now;
      if (hovered !== null && !state.alive[hovered]) hovered = null;
      if (options.onCount) options.onCount({ n_nodes: state.n_nodes, n_edges: state.n_edges, n_pruned: state.n_strong - state.n_edges, threshold, influence: state.influence, alive: state.alive });
      later();
    };

    const fit = (animated) => {
      touched = false;
      const visible = cy.nodes().not(".off");
      if (!visible.length) return;
      const box = visible.boundingBox(), left = 92, right = 30, upper = 34, lower = byPosition ? 54 : 34, w = cy.width(), h = cy.height();
      if (!w || !h) return;
      const zoom = Math.min((w - left - right) / Math.max(box.w, 60), (h - upper - lower) / Math.max(box.h, 60), 1.6);
      const pan = { x: left + ((w - left - right) - box.w * zoom) / 2 - box.x1 * zoom, y: upper + ((h - upper - lower) - box.h * zoom) / 2 - box.y1 * zoom };
      if (animated && !matchMedia("(prefers-reduced-motion: reduce)").matches) cy.animate({ zoom, pan, duration: 220 }); else cy.viewport({ zoom, pan });
    };

    // -- what is drawn above and below

    const sized = (canvas) => {
      const ratio = Math.min(window.devicePixelRatio || 1, 2), w = stage.clientWidth, h = stage.clientHeight;
      if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
      const context = canvas.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, w, h);
      return [context, w, h];
    };
    const at = (i) => { const zoom = cy.zoom(), pan = cy.pan(); return [nodes[i].x * zoom + pan.x, nodes[i].y * zoom + pan.y]; };
    const FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif";

    const drawUnder = () => {
      const [context, w] = sized(under), zoom = cy.zoom(), pan = cy.pan();
      context.strokeStyle = css("--line");
      context.lineWidth = 1;
      context.globalAlpha = 0.55;
      context.beginPath();
      sites.forEach((_, row) => { const y = Math.round(-row * gap * zoom + pan.y) + 0.5; context.moveTo(0, y); context.lineTo(w, y); });
      context.stroke();
    };

    const edge = (context, e, light) => {
      const [a, b, weight, strength] = edges[e], [x0, y0] = at(a), [x1, y1] = at(b);
      context.strokeStyle = css((weight ?? 1) >= 0 ? "--up" : "--down");
      context.globalAlpha = light;
      context.lineWidth = Math.max(width(strength) * cy.zoom(), 1.4);
      context.beginPath();
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
      context.stroke();
    };
    const ball = (context, i, ring) => {
      const [x, y] = at(i), radius = Math.max((cyNodes[i].data("size") / 2) * cy.zoom(), 2.5);
      context.globalAlpha = 1;
      context.beginPath();
      if (nodes[i].kind === "error") { context.moveTo(x - radius, y); context.lineTo(x, y - radius); context.lineTo(x + radius, y); context.lineTo(x, y + radius); context.closePath(); } else context.arc(x, y, radius, 0, 7);
      context.fillStyle = colourOf(nodes[i]);
      context.fill();
      context.lineWidth = ring ? 3 : 1.2;
      context.strokeStyle = ring || css("--paper");
      context.stroke();
    };

    const drawOver = () => {
      const [context, w, h] = sized(over), focus = hovered ?? chosen, lit = new Set();
      if (focus !== null && state.alive[focus]) {
        context.fillStyle = css("--paper");
        context.globalAlpha = 0.72;
        context.fillRect(0, 0, w, h);
        lit.add(focus);
        for (const e of state.kept) if (edges[e][0] === focus || edges[e][1] === focus) { edge(context, e, 0.9); lit.add(edges[e][0]).add(edges[e][1]); }
        lit.forEach((i) => ball(context, i, i === focus ? css("--ink") : null));
      }
      for (const i of matched) if (state.alive[i]) { lit.add(i); ball(context, i, `rgb(${css("--glow")})`); }
      names(context, w, h, lit, focus !== null && state.alive[focus]);
      rowNames(context, h);
      if (byPosition) tokenNames(context, w, h);
      context.globalAlpha = 1;
    };

    const names = (context, w, h, lit, onlyLit) => {
      const taken = [], zoom = cy.zoom(), wanted = [], room = state.n_nodes > 250 && zoom < 0.9 ? 45 : 140;
      for (let i = 0; i < nodes.length; i++) if (state.alive[i] && (!onlyLit || lit.has(i))) wanted.push(i);
      const weight = (i) => (i === hovered ? 4 : 0) + (i === chosen ? 3 : 0) + (lit.has(i) ? 2 : 0) + (nodes[i].kind === "output" ? 2 : 0) + state.influence[i] - (nodes[i].kind === "error" ? 0.5 : 0);
      wanted.sort((a, b) => weight(b) - weight(a));
      context.textAlign = "center";
      context.textBaseline = "top";
      context.globalAlpha = 1;
      let drawn = 0;
      for (const i of wanted) {
        if (drawn > room) break;
        const [x, y] = at(i);
        if (x < 0 || x > w || y < -10 || y > h) continue;
        const strong = lit.has(i);
        context.font = `${nodes[i].label_kind === "automatic" ? "italic " : ""}${strong ? 600 : 400} ${strong ? 12 : 11.5}px ${FONT}`;
        const name = shown(nodes[i].name ?? nodes[i].key ?? ""), long = strong ? 34 : 22, text = name.length > long ? `${name.slice(0, long - 1)}…` : name;
        const half = context.measureText(text).width / 2 + 4, size = (cyNodes[i].data("size") / 2) * zoom, y0 = y + size + 3, box = [x - half, y0 - 1, x + half, y0 + 14];
        if (taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) continue;
        taken.push(box);
        drawn++;
        context.fillStyle = css("--paper");
        context.globalAlpha = 0.78;
        context.fillRect(box[0], box[1], box[2] - box[0], 14);
        context.globalAlpha = 1;
        context.fillStyle = css("--ink");
        context.fillText(text, x, y0);
      }
    };

    const rowNames = (context, h) => {
      const zoom = cy.zoom(), pan = cy.pan();
      context.textAlign = "left";
      context.textBaseline = "middle";
      context.font = `600 12.5px ${FONT}`;
      let last = Infinity;
      sites.forEach((site, row) => {
        const y = -row * gap * zoom + pan.y;
        if (y < 8 || y > h - (byPosition ? 40 : 8) || last - y < 15) return;
        last = y;
        const wide = context.measureText(site).width;
        context.fillStyle = css("--paper");
        context.globalAlpha = 0.85;
        context.fillRect(6, y - 9, wide + 14, 18);
        context.globalAlpha = 1;
        context.fillStyle = css("--soft");
        context.fillText(site, 13, y);
      });
    };

    const tokenNames = (context, w, h) => {
      const zoom = cy.zoom(), pan = cy.pan(), last = Math.max(...nodes.map((node) => node.pos));
      context.fillStyle = css("--paper");
      context.globalAlpha = 0.9;
      context.fillRect(0, h - 34, w, 34);
      context.globalAlpha = 1;
      context.fillStyle = css("--ink");
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.font = `12px ${FONT}`;
      let edge = -Infinity;
      for (let pos = 0; pos <= last; pos++) {
        const x = pos * columnWidth * zoom + pan.x, text = shown((data.tokens && data.tokens[pos]) || `${pos}`).slice(0, 18), half = context.measureText(text).width / 2 + 3;
        if (x - half < edge || x < 0 || x > w) continue;
        edge = x + half;
        context.fillText(text, x, h - 17);
      }
    };

    const later = () => { if (!frame) frame = requestAnimationFrame(() => { frame = 0; if (!cy.destroyed()) { drawUnder(); drawOver(); } }); };
    cy.on("render pan zoom resize", later);

    // -- pointing and clicking

    const point = (event) => {
      const i = event.target.data("place"), node = nodes[i], box = stage.getBoundingClientRect(), where = event.renderedPosition;
      hovered = i;
      tip.replaceChildren(
        el("b", {}, shown(node.name ?? node.key ?? "")),
        el("div", { class: "soft small" }, [node.site, node.kind === "feature" ? node.index : node.kind === "error" ? "error node" : node.kind, node.pos >= 0 ? `position ${node.pos}` : null].filter((part) => part !== null && part !== undefined).join(" · ")),
        el("div", { class: "small" }, options.describe ? options.describe(node) : `influence ${percent(state.influence[i])}, ${state.kept.filter((e) => edges[e][1] === i).length} in, ${state.kept.filter((e) => edges[e][0] === i).length} out`),
        ...strongest(i));
      tip.hidden = false;
      tip.style.left = `${Math.min(where.x + 16, box.width - 370)}px`;
      tip.style.top = where.y > box.height * 0.62 ? "auto" : `${where.y + 14}px`;
      tip.style.bottom = where.y > box.height * 0.62 ? `${box.height - where.y + 14}px` : "auto";
      stage.style.cursor = "pointer";
      later();
    };
    const strongest = (i) => {
      const lines = [];
      for (const [side, other, word] of [[1, 0, "from"], [0, 1, "to"]]) {
        const own = state.kept.filter((e) => edges[e][side] === i).sort((a, b) => edges[b][3] - edges[a][3]).slice(0, 3);
        for (const e of own) lines.push(el("div", { class: "small" }, el("span", { class: "faint" }, `${word} `), el("span", { class: edges[e][2] >= 0 ? "up" : "down" }, signed(edges[e][2])), ` ${shown(nodes[edges[e][other]].name ?? "").slice(0, 40)}`));
      }
      return lines;
    };
    const leave = () => { hovered = null; tip.hidden = true; stage.style.cursor = ""; later(); };
    cy.on("mouseover", "node", point);
    cy.on("mouseout", "node", leave);
    cy.on("tap", "node", (event) => { tip.hidden = true; const node = nodes[event.target.data("place")]; chosen = node.place; later(); if (options.onNode) options.onNode(node); });
    cy.on("tap", (event) => { if (event.target === cy) { chosen = null; later(); if (options.onNothing) options.onNothing(); } });
    stage.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
      if (steps[event.key]) { event.preventDefault(); cy.panBy({ x: steps[event.key][0], y: steps[event.key][1] }); }
      if (event.key === "+" || event.key === "-") cy.zoom({ level: cy.zoom() * (event.key === "+" ? 1.25 : 0.8), renderedPosition: { x: cy.width() / 2, y: cy.height() / 2 } });
      if (event.key === "0") fit(true);
    });

    const picture = () => {
      const flat = el("canvas", { width: over.width, height: over.height }), context = flat.getContext("2d");
      context.fillStyle = css("--paper");
      context.fillRect(0, 0, flat.width, flat.height);
      context.drawImage(under, 0, 0);
      const drawn = new Image();
      drawn.onload = () => {
        context.drawImage(drawn, 0, 0, flat.width, flat.height);
        context.drawImage(over, 0, 0);
        flat.toBlob((blob) => { const link = el("a", { href: URL.createObjectURL(blob), download: "circuit.png" }); link.click(); setTimeout(() => URL.revokeObjectURL(link.href), 5000); });
      };
      drawn.src = cy.png({ output: "base64uri", full: false, scale: over.width / stage.clientWidth });
    };

    cy.on("dragpan scrollzoom pinchzoom", () => { touched = true; });
    const watch = new ResizeObserver(() => { cy.resize(); if (!touched) fit(false); later(); });
    watch.observe(stage);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const restyle = () => { cy.style().selector("edge.up").style("line-color", css("--up")).selector("edge.down").style("line-color", css("--down")).selector("node").style("border-color", css("--paper")).update(); later(); };
    dark.addEventListener("change", restyle);

    apply();
    arrange();
    fit(false);

    return {
      cy, nodes, edges, positioned,
      setThreshold(value) { threshold = value; apply(); arrange(); },
      arrange, fit,
      setByPosition(on) { byPosition = positioned && on; arrange(); fit(true); },
      select(key) { const node = nodes.find((n, i) => n.key === key && state.alive[i]); chosen = node ? node.place : null; later(); return node || null; },
      match(text) {
        const words = text.toLowerCase().split(/\s+/).filter(Boolean);
        matched = new Set(words.length ? nodes.filter((node) => words.every((word) => `${node.name} ${node.site}/${node.index}`.toLowerCase().includes(word))).map((node) => node.place) : []);
        later();
        return [...matched].filter((i) => state.alive[i]).length;
      },
      where(key) { const i = nodes.findIndex((n, k) => n.key === key && state.alive[k]); return i < 0 ? null : at(i); },
      resize() { cy.resize(); later(); },
      destroy() { watch.disconnect(); dark.removeEventListener("change", restyle); cy.destroy(); element.replaceChildren(); },
    };
  };

  Object.assign(window.featlas, { drawGraph, prune, mixed, RAMP });
})();
