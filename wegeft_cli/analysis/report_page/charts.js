
// ---- charts: drawing, the controls of the curves, values under the pointer, tables, CSV files
(() => {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const byId = (id) => document.getElementById(id);
  const byName = new Map(data.charts.map((chart) => [chart.name, chart]));
  const smoothing = byId("smoothing"), logarithmic = byId("logarithmic");
  const hiddenRuns = new Set();
  const seriesOf = (chart, row) =>
    "kind" in row && chart.by !== "kind" && chart.is_curve ? `${row[chart.by]}, ${row.kind}` : row[chart.by];
  const format = (value) => String(Number(value.toPrecision(5)));

  function chartConfig() {
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--ink").trim();
    const line = style.getPropertyValue("--line").trim();
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      view: { stroke: line },
      axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, gridOpacity: 0.6 },
    };
  }

  function groupRows(chart, rows) {
    const groups = new Map();
    for (const row of rows) {
      const name = seriesOf(chart, row);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(row);
    }
    return groups;
  }

  // An exponential moving average, free of the bias of its start. Validations stay as they are.
  function smooth(chart, rows, weight) {
    for (const group of groupRows(chart, rows).values()) {
      let sum = 0, mass = 0;
      for (const row of group) {
        sum = weight * sum + (1 - weight) * row.value;
        mass = weight * mass + (1 - weight);
        row.smooth = row.kind === "validation" ? row.value : sum / mass;
      }
    }
  }

  // The specification under the controls, and the rows that it shows.
  function prepare(chart) {
    const spec = structuredClone(chart.spec);
    if (!chart.is_curve) return { spec, rows: spec.data.values };
    let rows = spec.data.values.filter((row) => !hiddenRuns.has(row.run));
    if (logarithmic.checked) {
      const positive = rows.filter((row) => row.value > 0);
      if (positive.length) {
        rows = positive;
        spec.encoding.y.scale = { type: "log", nice: false };
        spec.encoding.y.axis = { labelOverlap: true, format: "~g" };
      }
    }
    const weight = Number(smoothing.value);
    if (weight > 0 && chart.is_noisy) {
      smooth(chart, rows, weight);
      const line = structuredClone(spec.layer[0]);
      line.encoding.y = { ...spec.encoding.y, field: "smooth" };
      spec.layer[0].mark.opacity = 0.25;
      spec.layer.splice(1, 0, line);
    }
    if (!rows.some((row) => row.marked)) spec.layer = spec.layer.filter((layer) => !layer.transform);
    spec.data.values = rows;
    return { spec, rows };
  }

  // ---- drawing
  const drawn = new Map(); // name of a chart -> result, rows
  async function draw(chart) {
    const place = byId(chart.name);
    place.style.minHeight = `${place.offsetHeight}px`; // the page keeps its place
    drawn.get(chart.name)?.result.finalize();
    drawn.delete(chart.name);
    const { spec, rows } = prepare(chart);
    if (!rows.length) return place.replaceChildren(make("p", "No values are shown.", "quiet"));
    const result = await window.vegaEmbed(place, spec, {
      actions: false,
      ast: true, // the policy of this page lets no text become code
      config: chartConfig(),
      renderer: chart.renderer,
      tooltip: { disableDefaultStyle: true, theme: "custom" },
    });
    drawn.set(chart.name, { result, rows });
    place.style.minHeight = "";
  }

  // One drawing at a time: a change while one is under way asks for another.
  let isDrawing = false;
  const asked = new Set();
  async function redraw(charts) {
    for (const chart of charts) asked.add(chart);
    if (isDrawing) return;
    isDrawing = true;
    delete root.dataset.charts;
    while (asked.size) {
      const [chart] = asked;
      asked.delete(chart);
      await draw(chart);
    }
    isDrawing = false;
    root.dataset.charts = String(drawn.size);
  }
  const redrawAll = () => redraw(data.charts);
  const redrawCurves = () => redraw(data.charts.filter((chart) => chart.is_curve));

  byId("theme").addEventListener("change", (event) => {
    if (event.target.value === "auto") delete root.dataset.theme;
    else root.dataset.theme = event.target.value;
    redrawAll();
  });
  system.addEventListener("change", redrawAll);
  smoothing?.addEventListener("input", () => {
    byId("smoothing-value").textContent = Number(smoothing.value).toFixed(2);
    redrawCurves();
  });
  logarithmic?.addEventListener("change", redrawCurves);
  for (const box of document.querySelectorAll("[data-run]")) {
    box.addEventListener("change", () => {
      if (box.checked) hiddenRuns.delete(box.dataset.run);
      else hiddenRuns.add(box.dataset.run);
      redrawCurves();
    });
  }

  // ---- values under the pointer
  const MOST_VALUES = 12, LONGEST_NAME = 44;
  const shorten = (name) => (name.length <= LONGEST_NAME ? name : `${name.slice(0, 18)}…${name.slice(-24)}`);
  function findNearest(rows, along, at) {
    return rows.reduce((best, row) => (Math.abs(row[along] - at) < Math.abs(best[along] - at) ? row : best));
  }

  function showValues(chart, figure, event) {
    const { result, rows } = drawn.get(chart.name) || {};
    const frame = figure.querySelector(".role-frame .background");
    if (!frame || !result) return hideValues(figure);
    const box = frame.getBoundingClientRect();
    if (event.clientX < box.left - 5 || event.clientX > box.right + 5) return hideValues(figure);
    const scale = result.view.scale("x");
    const at = findNearest(rows, chart.along, scale.invert(event.clientX - box.left))[chart.along];
    const lines = [...groupRows(chart, rows)].map(([name, group]) => [name, findNearest(group, chart.along, at)]);
    const whole = figure.getBoundingClientRect();
    const [rule, values] = figure.querySelectorAll(".rule, .values");
    const x = box.left + scale(at) - whole.left;
    Object.assign(rule.style, { left: `${x}px`, top: `${box.top - whole.top}px`, height: `${box.height}px` });
    const isLeft = x < whole.width / 2;
    Object.assign(values.style, {
      top: `${box.top - whole.top}px`,
      left: isLeft ? `${x + 10}px` : "auto",
      right: isLeft ? "auto" : `${whole.width - x + 10}px`,
      maxWidth: `${Math.max(x, whole.width - x) - 14}px`,
    });
    const texts = lines.slice(0, MOST_VALUES).map(([name, row]) => {
      const smoothed = "smooth" in row && row.kind !== "validation" ? ` (smoothed ${format(row.smooth)})` : "";
      const place = row[chart.along] === at ? "" : ` (${chart.along} ${row[chart.along]})`;
      const line = make("div");
      const mark = make("span", "", "mark");
      mark.style.background = chart.legend.find((each) => each.name === row[chart.by])?.color;
      line.append(mark, `${shorten(String(name))}: ${format(row.value)}${smoothed}${place}`);
      return line;
    });
    if (lines.length > MOST_VALUES) texts.push(make("div", `and ${lines.length - MOST_VALUES} more`));
    values.replaceChildren(make("strong", `${chart.along} ${at}`), ...texts);
    rule.hidden = values.hidden = false;
  }

  function hideValues(figure) {
    for (const element of figure.querySelectorAll(".rule, .values")) element.hidden = true;
  }

  for (const chart of data.charts.filter((each) => each.along)) {
    const place = byId(chart.name), figure = place.parentElement;
    for (const name of ["rule", "values"]) {
      const element = make("div", undefined, name);
      element.hidden = true;
      figure.append(element);
    }
    for (const name of ["pointermove", "pointerdown"]) {
      place.addEventListener(name, (event) => showValues(chart, figure, event));
    }
    place.addEventListener("pointerleave", () => hideValues(figure));
  }

  // ---- figures as a table and as a CSV file
  function makeTable(chart) {
    const table = make("table");
    table.append(make("caption", chart.title));
    const head = make("tr");
    for (const column of chart.columns) {
      const cell = make("th", column);
      cell.scope = "col";
      head.append(cell);
    }
    table.append(make("thead"));
    table.tHead.append(head);
    const body = make("tbody");
    for (const row of chart.spec.data.values) {
      const line = make("tr");
      for (const column of chart.columns) {
        const value = row[column];
        const text = typeof value === "number" ? String(Number(value.toPrecision(6))) : value;
        line.append(make("td", text, typeof value === "number" ? "n" : ""));
      }
      body.append(line);
    }
    table.append(body);
    return table;
  }

  for (const details of document.querySelectorAll("details[data-table]")) {
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const chart = byName.get(details.dataset.table);
      const region = make("div");
      region.tabIndex = 0;
      region.setAttribute("role", "region");
      region.setAttribute("aria-label", `Figures: ${chart.title}`);
      region.append(makeTable(chart));
      details.append(region);
    });
  }

  // A text that a spreadsheet would read as a formula gets an apostrophe.
  function toCell(value) {
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
    return `"${text.replaceAll('"', '""')}"`;
  }

  for (const button of document.querySelectorAll("button[data-csv]")) {
    button.addEventListener("click", () => {
      const chart = byName.get(button.dataset.csv);
      const lines = [chart.columns, ...chart.spec.data.values.map((row) => chart.columns.map((name) => row[name]))];
      const text = lines.map((line) => line.map(toCell).join(",")).join("\r\n") + "\r\n";
      const link = make("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = `${chart.name}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
  }

  redrawAll();
})();
