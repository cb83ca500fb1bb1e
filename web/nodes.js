// Two things that ComfyUI's page does not do by itself for nodes of packs.
import { app } from "../../scripts/app.js";

const CONTROL = ["fixed", "increment", "decrement", "randomize"];

// Queueing again shall mean the same job. The nodes declare that (control_after_generate: "fixed"), but
// older pages start every seed with "randomize" all the same.
function keepSeed(node) {
  for (const widget of node.widgets ?? []) {
    if (String(widget.options?.values) === String(CONTROL)) widget.value = "fixed";
  }
}

// The last picture of the run would be shown for ever, instead of the finished video.
function showVideoWhenDone(node) {
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.call(this, output);
    if (!output?.animated) return;
    for (const place of Object.keys(app.nodePreviewImages ?? {})) {
      if (place.split(":").pop() === String(this.id)) delete app.nodePreviewImages[place];
    }
    this.imgs = this.preview = this.images = undefined;
    this.setDirtyCanvas?.(true, true);
  };
}

app.registerExtension({
  name: "StreamDiffVSR.nodes",
  // Called for a node that is made; a saved workflow puts its own values in afterwards.
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("StreamDiffVSR_")) return;
    keepSeed(node);
    if (node.comfyClass === "StreamDiffVSR_UpscaleVideo") showVideoWhenDone(node);
  },
});
