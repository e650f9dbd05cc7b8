for (const pre of document.querySelectorAll("pre[data-copy]")) {
  const box = document.createElement("div"), button = document.createElement("button");
  box.className = "beside"; button.className = "copy"; button.type = "button"; button.textContent = "Copy";
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(pre); // over plain http, a browser gives no clipboard: the old way, or by hand
    const done = navigator.clipboard
      ? await navigator.clipboard.writeText(pre.textContent).then(() => true, () => false)
      : document.execCommand("copy");
    button.textContent = done ? "Copied" : "Selected"; setTimeout(() => { button.textContent = "Copy" }, 1500);
  });
  pre.replaceWith(box); box.append(pre, button);
}
