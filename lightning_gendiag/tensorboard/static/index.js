// The page of the tab.
export function render() {
  document.body.textContent = "GenDiag";
}
