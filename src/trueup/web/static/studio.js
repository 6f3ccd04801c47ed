// What the studio does in the browser by itself: choices kept in cookies, and copying.
function trueupChoose(name, value) {
  document.cookie = `trueup_${name}=${value}; path=/; max-age=31536000; SameSite=Strict`;
  location.reload();
}

async function trueupCopy(event) {
  const button = event.target.closest("button");
  const text = button.closest(".code").querySelector(".code-words").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without a secure context there is no clipboard: select the text, and copy the old way.
    const range = document.createRange();
    range.selectNodeContents(button.closest(".code").querySelector(".code-words"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
  }
  button.classList.add("copied");
  setTimeout(() => button.classList.remove("copied"), 1500);
}

// A log shows its end, unless someone has scrolled up in it.
function trueupFollow(id) {
  const log = getHtmlElement(id);
  if (!log) return;
  if (log.dataset.held === undefined) {
    log.dataset.held = "";
    log.addEventListener("scroll", () => {
      log.dataset.held = log.scrollTop + log.clientHeight < log.scrollHeight - 24 ? "1" : "";
    });
  }
  if (!log.dataset.held) log.scrollTop = log.scrollHeight;
}
