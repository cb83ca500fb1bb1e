import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const CONTROL = ["fixed", "increment", "decrement", "randomize"];
const LIVE = "live picture";

// Queueing again shall mean the same job. The nodes declare that (control_after_generate: "fixed"), but
// older pages start every seed with "randomize" all the same.
function keepSeed(node) {
  for (const widget of node.widgets ?? []) {
    if (String(widget.options?.values) === String(CONTROL)) widget.value = "fixed";
  }
}

// A node in a subgraph is told by the way to it, as in 5:12.
function nodeOf(id) {
  let graph = app.graph.rootGraph ?? app.graph;
  const way = String(id).split(":");
  for (const step of way.slice(0, -1)) graph = graph?.getNodeById(Number(step))?.subgraph;
  return graph?.getNodeById(Number(way.at(-1)));
}

// The newest frame of a running video node, in a widget of its own: pages put the finished video, which
// core shows by itself, behind the pictures that core knows of, or leave it out.
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
  // Called for a node that is made; a saved workflow puts its own values in afterwards.
  nodeCreated(node) {
    if (node.comfyClass?.startsWith("StreamDiffVSR_")) keepSeed(node);
  },
});
