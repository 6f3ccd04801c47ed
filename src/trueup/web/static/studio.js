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
