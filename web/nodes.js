import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const CONTROL = ["fixed", "increment", "decrement", "randomize"];
const LIVE = "live picture";

// Queueing a workflow again should run the same job. The nodes request this (control_after_generate:
// "fixed"), but older frontends still set every seed to "randomize".
function keepSeed(node) {
  for (const widget of node.widgets ?? []) {
    if (String(widget.options?.values) === String(CONTROL)) widget.value = "fixed";
  }
}

// Find a node by its id; for a node in a subgraph, this is a path such as 5:12.
function nodeOf(id) {
  let graph = app.graph.rootGraph ?? app.graph;
  const way = String(id).split(":");
  for (const step of way.slice(0, -1)) graph = graph?.getNodeById(Number(step))?.subgraph;
  return graph?.getNodeById(Number(way.at(-1)));
}

// Show the newest frame of a running video node, in a separate widget: if core's own picture preview were
// used, frontends would put the finished video, which core displays, after it or leave it out.
function showLive(node, jpeg) {
  let widget = node.widgets?.find((each) => each.name === LIVE);
  if (!widget) {
    const picture = document.createElement("img");
    Object.assign(picture.style, { width: "100%", height: "100%", objectFit: "contain" });
    widget = node.addDOMWidget(LIVE, "image", picture, { serialize: false, hideOnZoom: false });
    widget.serialize = false;
    widget.computeLayoutSize = () => ({ minHeight: 200, minWidth: 0 });
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  }
  widget.element.src = `data:image/jpeg;base64,${jpeg}`;
  node.setDirtyCanvas?.(true, true);
}

function hideLive(node) {
  const widget = node?.widgets?.find((each) => each.name === LIVE);
  if (!widget) return;
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.setSize([node.size[0], node.computeSize()[1]]);
}

app.registerExtension({
  name: "StreamDiffVSR.nodes",
  setup() {
    api.addEventListener("stream_diffvsr.live", ({ detail }) => {
      const node = nodeOf(detail.node);
      if (node) showLive(node, detail.jpeg);
    });
    for (const kind of ["executed", "execution_error", "execution_interrupted"]) {
      api.addEventListener(kind, ({ detail }) => hideLive(nodeOf(detail.node ?? detail.node_id)));
    }
  },
  // Called when a node is created, before the values of a saved workflow are restored.
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("StreamDiffVSR_")) keepSeed(node);
  },
});
