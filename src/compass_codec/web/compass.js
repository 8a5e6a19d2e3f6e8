// For pages with <img data-cmps="photo.cmps">: each shows its smallest layer first, and larger ones as they arrive, up to
// the width that the page gives it. Pictures with src="photo.cmps?w=640" are loaded again once the worker is there.

// The address of this script may name the worker's scope, compass.js?scope=/, where it is not the script's own folder.
const scope = new URL(import.meta.url).searchParams.get("scope") ?? undefined;

async function controlled() {
  const { serviceWorker } = navigator;
  if (!serviceWorker) throw new Error("no service worker: it needs https or localhost");
  await serviceWorker.register(new URL("sw.js", import.meta.url), { type: "module", scope });
  if (!serviceWorker.controller)
    await new Promise((resolve) => serviceWorker.addEventListener("controllerchange", resolve, { once: true }));
}

/** Layer after layer, until one is as wide as the picture is shown. What cannot be decoded leaves the one before it. */
async function grow(img) {
  const wanted = Math.ceil((img.clientWidth || 1) * devicePixelRatio);
  for (let width = 0; width < wanted; ) {
    const next = new Image();
    next.src = `${img.dataset.cmps}?w=${width + 1}`;
    try {
      await next.decode();
    } catch {
      return width ? undefined : img.dispatchEvent(new Event("error"));
    }
    if (next.naturalWidth <= width) return; // the largest there is
    img.src = next.src;
    width = next.naturalWidth;
  }
}

try {
  await controlled();
} catch (error) {
  for (const img of document.querySelectorAll("img[data-cmps]")) img.dispatchEvent(new Event("error"));
  throw error;
}
for (const img of document.images) {
  if (img.dataset.cmps) grow(img);
  else if (/\.cmps\?/.test(img.currentSrc || img.src)) img.src = img.src;
}
