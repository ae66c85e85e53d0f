// A page that is written again and again says how old it is, and loads the newer one: what was unfolded stays so.
{
  const line = document.getElementById("live");
  const every = Number(line.dataset.every), written = Number(line.dataset.written), name = `open ${location.pathname}`;
  const folds = [...document.querySelectorAll("details")];
  const age = () => Math.max(0, Date.now() / 1000 - written);
  const words = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`);
  const tell = () => {
    const late = age() > 3 * every + 120;
    line.textContent = `Written ${words(age())} ago, and anew every ${words(every)} while the run goes on.` +
      (late ? " That is long ago: the run may have been killed." : "");
    line.className = late ? "alert" : "soft";
  };
  try {
    for (const place of JSON.parse(sessionStorage.getItem(name) ?? "[]")) if (folds[place]) folds[place].open = true;
  } catch { /* a browser that keeps nothing */ }
  const renew = () => {
    const busy = [...document.querySelectorAll("video")].some((video) => !video.paused) || String(getSelection());
    if (busy) return;
    try {
      sessionStorage.setItem(name, JSON.stringify(folds.flatMap((fold, place) => (fold.open ? [place] : []))));
    } catch { /* likewise */ }
    location.reload();
  };
  tell();
  setInterval(tell, 1000);
  setInterval(renew, 1000 * every);
}
