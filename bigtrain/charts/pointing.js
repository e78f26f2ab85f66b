"use strict";

function bytes(value) {
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < 4) { value /= 1024; unit += 1; }
  return value.toFixed(unit ? 3 : 0) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][unit];
}

/* Return where in a rising list the number nearest to the wanted one is. */
function nearest(positions, wanted) {
  const place = reached(positions, wanted), next = Math.min(place + 1, positions.length - 1);
  return positions[next] - wanted < wanted - positions[place] ? next : place;
}

/* Return where in a rising list the last number is that is not above the wanted one. */
function reached(positions, wanted) {
  let low = 0, high = positions.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (positions[middle] <= wanted) low = middle; else high = middle - 1;
  }
  return low;
}

/* Let a line and a text follow the pointer over a chart, and the arrow keys while it has the focus.
   chart.axis: the first and last position, and where those are in the SVG's units. find(positions, wanted): which
   position a pointer means. text(index): what to say there. */
function follow(svg, chart, positions, find, text) {
  const [first, last, left, right] = chart.axis;
  const cursor = svg.querySelector(".cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  svg.parentElement.append(tip);
  let place = positions.length - 1;

  function hide() {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  }

  function point(index) {
    place = Math.min(positions.length - 1, Math.max(0, index));
    const x = left + (right - left) * (positions[place] - first) / (last - first);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    tip.textContent = text(place);
    tip.hidden = false;
    const scale = svg.clientWidth / chart.width;
    const beside = x * scale + 12;
    tip.style.left = (beside + tip.offsetWidth > svg.clientWidth ? x * scale - 12 - tip.offsetWidth : beside) + "px";
  }

  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.width / box.width;
    if (x < left - 8 || x > right + 8) hide();
    else point(find(positions, first + (last - first) * (x - left) / (right - left)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -positions.length, End: positions.length }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    point(tip.hidden ? place : place + move);
  });
}

