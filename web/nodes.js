// Two things that ComfyUI's page does not do by itself for nodes of packs.
import { app } from "../../scripts/app.js";

const CONTROL = ["fixed", "increment", "decrement", "randomize"];
const PICTURES = ["$$canvas-image-preview", "$$comfy_animation_preview"];
const VIDEO = ["video-preview"];

// Queueing again shall mean the same job. The nodes declare that (control_after_generate: "fixed"), but
// older pages start every seed with "randomize" all the same.
function keepSeed(node) {
  for (const widget of node.widgets ?? []) {
    if (String(widget.options?.values) === String(CONTROL)) widget.value = "fixed";
  }
}

function forget(store, node) {
  for (const place of Object.keys(store ?? {})) {
    if (place.split(":").pop() === String(node.id)) delete store[place];
  }
}

function removeWidgets(node, names) {
  for (const widget of (node.widgets ?? []).filter((widget) => names.includes(widget.name))) {
    widget.onRemove?.();
    node.widgets.splice(node.widgets.indexOf(widget), 1);
  }
}

// The page shows either pictures or a video, whichever a node had first: the last picture of a run would
// stay in the place of the finished video, and that one in the place of the next run's pictures.
function showPicturesThenVideo(node) {
  const { onExecutionStart, onExecuted } = node;
  node.onExecutionStart = function () {
    onExecutionStart?.call(this);
    removeWidgets(this, VIDEO);
    forget(app.nodeOutputs, this);
    Object.assign(this, { videoContainer: undefined, animatedImages: undefined, images: undefined });
    this.previewMediaType = "image";
  };
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    if (!output?.animated) return;
    removeWidgets(this, PICTURES);
    forget(app.nodePreviewImages, this);
    Object.assign(this, { imgs: undefined, preview: undefined, images: undefined });
    this.setDirtyCanvas?.(true, true);
  };
}

app.registerExtension({
  name: "StreamDiffVSR.nodes",
  // Called for a node that is made; a saved workflow puts its own values in afterwards.
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("StreamDiffVSR_")) return;
    keepSeed(node);
    if (node.comfyClass === "StreamDiffVSR_UpscaleVideo") showPicturesThenVideo(node);
  },
});
