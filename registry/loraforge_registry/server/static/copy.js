for (const pre of document.querySelectorAll("pre[data-copy]")) {
  const box = document.createElement("div"), button = document.createElement("button");
  box.className = "copy"; button.type = "button"; button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(pre.textContent);
    button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy" }, 1500);
  });
  pre.replaceWith(box); box.append(pre, button);
}
