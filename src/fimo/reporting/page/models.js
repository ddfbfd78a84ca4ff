const rows = dataTable(document.querySelector('.data[data-run="0"]'), data.runs[0].rows);
dataTable(document.querySelector('.data[data-methods="0"]'), data.runs[0].methods);
document.querySelectorAll(".find").forEach((b) => b.addEventListener("click", () => rows.find(b.dataset.find)));

drawAll();
