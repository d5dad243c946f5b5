// Two charts drawn as SVG: the loss by round, and the round timeline. Text only through textContent.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const PHASES = ["compute", "wait", "encode", "send", "receive", "reduce", "apply", "exchange"];

// Peers choose their names: control and direction characters are shown as what they are.
function clean(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}]/gu, (char) => `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`);
}

function svgNode(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = clean(text);
  return node;
}

function placeholder(box, text) {
  const node = document.createElement("div");
  node.className = "empty";
  node.textContent = text;
  box.replaceChildren(node);
}

// Ticks at 1, 2 or 5 times a power of ten.
function niceStep(span, count) {
  const raw = span / Math.max(1, count);
  const power = Math.pow(10, Math.floor(Math.log10(raw)));
  const ratio = raw / power;
  return (ratio <= 1 ? 1 : ratio <= 2 ? 2 : ratio <= 5 ? 5 : 10) * power;
}

function drawLoss(box, losses, abortedRounds) {
  const points = losses.filter((p) => Number.isFinite(p[1]));
  if (points.length === 0) return placeholder(box, "no loss was measured yet");
  const width = Math.max(300, box.clientWidth), height = 230;
  const left = 44, right = 14, top = 10, bottom = 24;
  const first = points[0][0], last = Math.max(points[points.length - 1][0], first + 1);
  let low = Math.min(...points.map((p) => p[1])), high = Math.max(...points.map((p) => p[1]));
  if (high - low < 1e-6) { high += 0.5; low -= 0.5; }
  const step = niceStep(high - low, 4);
  low = Math.floor(low / step) * step;
  high = Math.ceil(high / step) * step;
  const x = (round) => left + ((round - first) / (last - first)) * (width - left - right);
  const y = (loss) => top + ((high - loss) / (high - low)) * (height - top - bottom);
  const svg = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(svgNode("title", {}, `loss from ${points[0][1].toFixed(3)} to ${points[points.length - 1][1].toFixed(3)}`));
  const digits = Math.max(0, Math.min(4, -Math.floor(Math.log10(step))));
  for (let value = low; value <= high + step / 2; value += step) {
    svg.append(svgNode("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }));
    svg.append(svgNode("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits)));
  }
  const roundStep = Math.max(1, Math.round(niceStep(last - first, Math.min(8, width / 90))));
  for (let round = Math.ceil(first / roundStep) * roundStep; round <= last; round += roundStep) {
    svg.append(svgNode("text", { x: x(round), y: height - 6, "text-anchor": "middle" }, String(round)));
  }
  const path = points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
  const floor = height - bottom;
  const end = x(points[points.length - 1][0]).toFixed(1), start = x(first).toFixed(1);
  svg.append(svgNode("path", { d: `${path}L${end} ${floor}L${start} ${floor}Z`, class: "area" }));
  svg.append(svgNode("path", { d: path, class: "curve" }));
  for (const round of abortedRounds) {
    if (round < first || round > last) continue;
    const mark = svgNode("rect", { x: x(round) - 1.5, y: floor - 7, width: 3, height: 7, class: "aborted" });
    mark.append(svgNode("title", {}, `an attempt of round ${round} was aborted`));
    svg.append(mark);
  }
  const dots = points.length > 80 ? points.slice(-1) : points;
  for (const [round, loss] of dots) {
    const dot = svgNode("circle", { cx: x(round), cy: y(loss), r: 3.2, class: "point" });
    dot.append(svgNode("title", {}, `round ${round}: ${loss.toFixed(4)}`));
    svg.append(dot);
  }
  box.replaceChildren(svg);
}

// Segments of one member in one round: [lane, part, phase, begin, end] in wall seconds. Lane 0 is the
// trainer's, lane 1 the network's. Part 0 fills the lane; sending has its upper half (1), receiving its
// lower half (2), for both go on at once.
function segmentsOf(row) {
  const opened = row.opened_wall_s, handed = opened + (row.t_open_offset_s || 0);
  const value = (name) => Math.max(0, row[name] || 0);
  const out = [
    ...computing(row, opened, handed),
    [0, 0, "wait", handed, handed + value("wait_s")],
    [1, 0, "encode", handed, handed + value("encode_s")],
  ];
  if (!hasPhases(row) && row.decided_wall_s) {
    out.push([1, 0, "exchange", Math.max(opened, handed), row.decided_wall_s]);
  }
  for (const phase of ["reduce", "apply"]) {
    const at = opened + (row[`t_${phase}_offset_s`] || 0);
    out.push([1, 0, phase, at, at + value(`${phase}_s`)]);
  }
  for (const [part, phase] of [[1, "send"], [2, "receive"]]) {
    const at = row[`t_${phase}_offset_s`] || 0;
    const spans = row[`${phase}_spans_s`] || [[at, at + value(`${phase}_s`)]];
    for (const [begin, end] of spans) out.push([1, part, phase, opened + begin, opened + end]);
  }
  return out.filter((segment) => segment[4] > segment[3]);
}
// A trainer of rounds computes until it hands over; one of stages whenever a hop is asked of it.
function computing(row, opened, handed) {
  if (row.compute_spans_s) return row.compute_spans_s.map(([begin, end]) => [0, 0, "compute", opened + begin, opened + end]);
  return [[0, 0, "compute", handed - Math.max(0, row.compute_s || 0), handed]];
}
function hasPhases(row) {
  return row.send_s !== undefined || row.receive_s !== undefined;
}

function drawTimeline(box, rows, names, count) {
  const rounds = [...new Map(rows.map((r) => [`${r.channel || ""}#${r.round}`, r])).values()]
    .sort((a, b) => a.opened_wall_s - b.opened_wall_s).slice(-count);
  if (rounds.length === 0) return placeholder(box, "no figures yet: members report them after each round");
  const wanted = new Set(rounds.map((r) => `${r.channel || ""}#${r.round}`));
  const shown = rows.filter((r) => wanted.has(`${r.channel || ""}#${r.round}`));
  const members = [...new Set(shown.map((r) => r.id))].sort((a, b) => nameOf(names, a).localeCompare(nameOf(names, b)));
  const spans = shown.flatMap(segmentsOf);
  const from = Math.min(...rounds.map((r) => r.opened_wall_s), ...spans.map((s) => s[3]));
  const to = Math.max(...rounds.map((r) => r.opened_wall_s), ...spans.map((s) => s[4]));
  const total = Math.max(1e-3, to - from);
  const width = Math.max(640, box.clientWidth), left = 104, right = 12, top = 22;
  const lane = 15, gap = 2, rowHeight = 2 * lane + gap + 13;
  const height = top + members.length * rowHeight + 22;
  const x = (t) => left + ((t - from) / total) * (width - left - right);
  const svg = svgNode("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img" });
  svg.append(svgNode("title", {}, "compute and transfer of each member in the newest rounds"));
  const step = niceStep(total, Math.min(10, width / 90));
  for (let t = 0; t <= total; t += step) {
    svg.append(svgNode("line", { x1: x(from + t), x2: x(from + t), y1: top, y2: height - 20, class: "grid" }));
    svg.append(svgNode("text", { x: x(from + t), y: height - 6, "text-anchor": "middle" }, `${Number(t.toPrecision(6))} s`));
  }
  members.forEach((id, index) => {
    const y = top + index * rowHeight;
    const label = nameOf(names, id);
    svg.append(svgNode("text", { x: 0, y: y + lane + 6, class: "who" }, label.length > 14 ? label.slice(0, 13) + "…" : label));
    for (const at of [0, 1]) {
      svg.append(svgNode("rect", { x: left, y: y + at * (lane + gap), width: width - left - right, height: lane, rx: 3, class: "lane" }));
    }
    for (const row of shown.filter((r) => r.id === id)) {
      for (const [at, part, phase, begin, end] of segmentsOf(row)) {
        const half = (lane - 1) / 2, down = at * (lane + gap) + (part === 2 ? half + 1 : 0);
        const bar = svgNode("rect", { x: x(begin), y: y + down, width: Math.max(2, x(end) - x(begin)), height: part ? half : lane, rx: part ? 1 : 2, class: phase });
        bar.append(svgNode("title", {}, `${label}, ${unit()} ${row.round}: ${phase} ${(1000 * (end - begin)).toPrecision(3)} ms, ${(1000 * (begin - row.opened_wall_s)).toFixed(0)} ms after it was ${isSteps() ? "closed" : "opened"}`));
        svg.append(bar);
      }
    }
  });
  let lastLabel = -Infinity;
  for (const round of rounds) {
    const at = x(round.opened_wall_s);
    svg.append(svgNode("line", { x1: at, x2: at, y1: top - 4, y2: height - 20, class: "opened" }));
    if (at - lastLabel > 34) {
      svg.append(svgNode("text", { x: at, y: 12, "text-anchor": "middle" }, `#${round.round}`));
      lastLabel = at;
    }
  }
  box.replaceChildren(svg);
}

function nameOf(names, id) {
  return names.get(id) || String(id).slice(0, 8);
}
