// Shows the figures of one question, which the address keeps.
const filter = document.getElementById("gallery-filter");
const show = () => {
  const asked = filter.value;
  for (const part of document.querySelectorAll(".gallery")) part.hidden = asked !== "" && part.dataset.question !== asked;
  history.replaceState(null, "", asked ? `?question=${asked}` : location.pathname + location.hash);
};
filter.value = new URLSearchParams(location.search).get("question") ?? "";
if (filter.selectedIndex < 0) filter.value = "";
filter.addEventListener("input", show);
show();
