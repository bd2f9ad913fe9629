// Builds the menu that shows the figures of one page, which the address keeps. Without a script all figures are shown.
const parts = [...document.querySelectorAll(".gallery")];
const filter = document.createElement("select");
filter.id = "gallery-filter";
filter.add(new Option("all pages", ""));
for (const part of parts) filter.add(new Option(part.querySelector("h2 a").textContent, part.dataset.question));
const label = document.createElement("label");
label.append("Show the figures of ", filter);
const paragraph = document.createElement("p");
paragraph.className = "gallery-filter";
paragraph.append(label);
parts[0].before(paragraph);

const show = () => {
  const asked = filter.value;
  for (const part of parts) part.hidden = asked !== "" && part.dataset.question !== asked;
  history.replaceState(null, "", asked ? `?question=${asked}` : location.pathname + location.hash);
};
filter.value = new URLSearchParams(location.search).get("question") ?? "";
if (filter.selectedIndex < 0) filter.value = "";
filter.addEventListener("input", show);
show();
