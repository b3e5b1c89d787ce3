// The report of a run: the order of its gallery, its heatmaps, and the categories of its errors.

const all = (selector, element = document) => [...element.querySelectorAll(selector)];
const one = (selector, element = document) => element.querySelector(selector);
const root = document.documentElement;
root.classList.add('js');
const list = one('#labelled');
const form = one('.controls');

// Orders of cards; slide10 comes after slide9.
const byName = (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, {numeric: true});
const highestFirst = key => (a, b) => b.dataset[key] - a.dataset[key];

// Order, hide and count the cards, as the controls say.
function arrangeCards() {
  const order = form.elements.order.value;
  const onlyErrors = form.elements.show.value == 'wrong';
  const cards = all('.card', list);
  cards.sort(order == 'name' ? byName : highestFirst(order));
  list.append(...cards);
  for (const card of cards) card.hidden = onlyErrors && !card.classList.contains('wrong');
  const shown = cards.filter(card => !card.hidden).length;
  one('#count').textContent = `${shown} of the ${cards.length} slides of this page shown`;
}

function arrange() {
  if (list) arrangeCards();
  root.classList.toggle('own-scale', form?.elements.scale?.value == 'own');
  const heat = one('#heat');
  if (heat) root.style.setProperty('--fade', heat.checked ? one('.fade').value / 100 : 0);
}

form?.addEventListener('input', event => {
  if (event.target.matches('.fade')) one('#heat').checked = true;
  arrange();
});
form?.addEventListener('submit', event => event.preventDefault());
addEventListener('beforeprint', () => {
  for (const details of all('details')) details.open = true;
});

// Categories of errors: the browser keeps what is written, as long as it keeps anything.
const fields = all('.category');
const store = `categories of ${one('#save')?.dataset.run}`;

function readKept() {
  try {
    return JSON.parse(localStorage.getItem(store)) || {};
  } catch {
    return {};
  }
}

function keep(kept) {
  try {
    localStorage.setItem(store, JSON.stringify(kept));
  } catch {}
}

function forget() {
  try {
    localStorage.removeItem(store);
  } catch {}
}

const kept = readKept();
for (const field of fields) {
  const number = field.dataset.number;
  if (number in kept) field.value = kept[number];
  field.addEventListener('input', () => {
    kept[number] = field.value;
    keep(kept);
  });
}

one('#forget')?.addEventListener('click', () => {
  forget();
  for (const field of fields) {
    delete kept[field.dataset.number];
    field.value = field.defaultValue;
  }
  one('#saved').textContent = 'Forgotten';
});

// A CSV file; a spreadsheet would compute a cell that begins like a formula.
const safe = value => /^[=+@-]/.test(value) ? `'${value}` : value;
const quoted = value => `"${value.replaceAll('"', '""')}"`;
const line = row => row.map(quoted).join(',') + '\r\n';

function download(name, parts) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob(parts, {type: 'text/csv'}));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

one('#save')?.addEventListener('click', () => {
  const by = one('#save').dataset.by;
  const rows = [[by, 'error', 'category']];
  for (const {dataset, value} of fields) {
    const slide = by == 'number' ? dataset.number : dataset.slide;
    rows.push([slide, dataset.error, safe(value)]);
  }
  download('categories.csv', ['\ufeff', ...rows.map(line)]);
  const filled = fields.filter(field => field.value.trim()).length;
  one('#saved').textContent = `${filled} of ${fields.length} have a category`;
});

arrange();
