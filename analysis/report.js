// Pointing at a node draws its edges on top, strong and opaque; leaving it takes them away again.
(() => {
  const plot = document.getElementById("circuit");
  if (!plot || !plot.layout || !plot.layout.meta) return;
  const edges = plot.layout.meta.edges;
  const layers = plot.data.map((trace, i) => [trace.name, i]).filter(([name]) => name.startsWith("highlight")).map(([, i]) => i);
  const steps = Array.from({ length: 15 }, (_, i) => i / 14);
  const show = (node) => {
    const x = [[], []], y = [[], []];
    for (const [x0, y0, x1, y1, source, target, raises] of edges) {
      if (source !== node && target !== node) continue;
      const side = raises ? 0 : 1;
      for (const t of steps) {
        x[side].push(x0 + (x1 - x0) * (3 * t * t - 2 * t * t * t));
        y[side].push(y0 + (y1 - y0) * t);
      }
      x[side].push(null);
      y[side].push(null);
    }
    Plotly.restyle(plot, { x, y }, layers);
  };
  let shown = null;
  plot.on("plotly_hover", (event) => {
    const node = event.points[0].customdata;
    if (node && node !== shown) { shown = node; show(node); }
  });
  plot.on("plotly_unhover", () => { if (shown) { shown = null; show(null); } });
})();
