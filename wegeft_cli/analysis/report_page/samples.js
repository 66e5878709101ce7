
// ---- samples: filters and pages over the answers in the data block
(() => {
  const PAGE = 10;
  const list = document.getElementById("sample-list");
  if (list) {
    const byId = (id) => document.getElementById(id);
    const [task, model, outcome, other, search] =
      ["filter-task", "filter-model", "filter-outcome", "filter-other", "filter-text"].map(byId);
    const unique = (values) => [...new Set(values)];
    const nameTask = (row) => `${row.task} (${row.protocol})`;
    const models = unique(data.answers.flatMap((row) => Object.keys(row.by)));
    let page = 0;

    function addOptions(select, values) {
      for (const value of values) {
        const option = make("option", value);
        option.value = value;
        select.append(option);
      }
    }
    addOptions(task, ["all", ...unique(data.answers.map(nameTask))]);
    addOptions(model, models);
    addOptions(other, models);
    model.value = models.find((name) => !name.endsWith(": base")) || models[0];
    other.value = models.find((name) => name.endsWith(": base")) || models[0];

    function fits(row) {
      if (task.value !== "all" && nameTask(row) !== task.value) return false;
      const mine = row.by[model.value], theirs = row.by[other.value];
      if (!mine) return false;
      if (outcome.value === "right" && !mine.correct) return false;
      if (outcome.value === "wrong" && mine.correct) return false;
      if (outcome.value === "unreadable" && mine.valid) return false;
      if (outcome.value === "fixed" && !(theirs && mine.correct && !theirs.correct)) return false;
      if (outcome.value === "broken" && !(theirs && !mine.correct && theirs.correct)) return false;
      const wanted = search.value.toLowerCase();
      if (!wanted) return true;
      const outputs = Object.values(row.by).map((each) => each.output);
      return [row.prompt, row.answer, ...outputs].join("\n").toLowerCase().includes(wanted);
    }

    function showAnswer(name, answer) {
      const box = make("div", undefined, answer.correct ? "is-right" : "is-wrong");
      box.append(make("div", name, "who"));
      const verdict = answer.correct ? "✓ right" : answer.valid ? "✗ wrong" : "✗ no readable answer";
      box.append(make("strong", verdict, "verdict"));
      if (answer.prediction !== null) box.append(make("span", `, read as ${answer.prediction}`));
      const output = make("div", answer.output || "(nothing)", "output");
      output.tabIndex = 0;
      output.setAttribute("role", "region");
      output.setAttribute("aria-label", `Output of ${name}`);
      box.append(output);
      return box;
    }

    function show(row) {
      const item = make("li");
      item.append(make("div", `${nameTask(row)}, row ${row.index}`, "who"));
      item.append(make("div", row.prompt, "prompt"));
      item.append(make("div", `Expected: ${row.answer}`));
      const answers = make("div", undefined, "answers");
      for (const name of models) if (row.by[name]) answers.append(showAnswer(name, row.by[name]));
      item.append(answers);
      return item;
    }

    function update() {
      const found = data.answers.filter(fits);
      const numPages = Math.max(1, Math.ceil(found.length / PAGE));
      page = Math.min(page, numPages - 1);
      list.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(show));
      byId("sample-count").textContent = `${found.length} of ${data.answers.length} samples`;
      byId("page-number").textContent = `page ${page + 1} of ${numPages}`;
      byId("previous").disabled = page === 0;
      byId("next").disabled = page === numPages - 1;
    }

    function turn(by) {
      page += by;
      update();
      byId("samples").scrollIntoView();
    }
    const restart = () => { page = 0; update(); };
    for (const select of [task, model, outcome, other]) select.addEventListener("change", restart);
    search.addEventListener("input", restart);
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    update();
  }
})();
