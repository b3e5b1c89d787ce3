// The page of a slide: shows and hides its layers, and zooms where tiles and OpenSeadragon are there.

const all = (selector, element = document) => [...element.querySelectorAll(selector)];
const one = (selector, element = document) => element.querySelector(selector);
const root = document.documentElement;
root.classList.add('js');
const settings = JSON.parse(one('#said').textContent);
const frame = one('#frame');
const stage = one('#stage');
const form = one('.controls');
const over = all('.over', stage); // maps and outlines

// Show, hide and fade what lies over the picture, as the controls say.
function arrange() {
  for (const layer of all('.layer', form)) {
    const own = over.filter(element => element.dataset.layer == layer.dataset.layer);
    for (const element of own) {
      const isOutline = element.classList.contains('outline');
      const box = isOutline ? '[name=outline]' : '[name=shown]';
      element.toggleAttribute('hidden', !one(box, layer).checked);
      if (!isOutline) element.style.opacity = one('[name=fade]', layer).value / 100;
    }
  }
}

form.addEventListener('input', event => {
  if (event.target.name == 'fade') {
    one('[name=shown]', event.target.closest('.layer')).checked = true;
  }
  arrange();
});
form.addEventListener('submit', event => event.preventDefault());

// What lies under the cursor: where it is, and the values of the maps that are shown there.
const under = one('#under');
const HINT = 'Point at the picture to see positions, from its upper left corner, and values.';
const shareOf = {}; // `at`: from a point of the window to shares of the picture's width and height

shareOf.at = point => {
  const box = stage.getBoundingClientRect();
  return [(point.clientX - box.left) / box.width, (point.clientY - box.top) / box.height];
};

const values = settings.values.map(each => {
  const bytes = Uint8Array.from(atob(each.numbers), letter => letter.charCodeAt(0));
  return {...each, numbers: new Uint16Array(bytes.buffer)};
});

// The value of a map at shares of the picture's width and height; null where it has none.
function valueAt(map, x, y) {
  const {rows, columns, full, numbers} = values[map.values];
  const row = Math.floor(y / map.extent[0] * rows);
  const column = Math.floor(x / map.extent[1] * columns);
  if (row >= rows || column >= columns) return null;
  return numbers[row * columns + column] / 65535 * full;
}

const shortest = number => String(Number(number.toPrecision(3)));

function wordsAt(x, y) {
  const [height, width] = settings.seen;
  const pixel = `pixel ${Math.floor(x * width)}, ${Math.floor(y * height)}`;
  const parts = [pixel];
  if (settings.spacing) {
    const microns = settings.spacing * settings.size[1] / width; // per pixel that was seen
    const place = [x * width, y * height].map(number => Math.round(number * microns));
    parts[0] = `${place[0]}, ${place[1]} µm (${pixel})`;
  }
  settings.maps.forEach((map, number) => {
    if (map.values === null) return;
    if (!one('[name=shown]', one(`.layer[data-layer="${number}"]`, form)).checked) return;
    const value = valueAt(map, x, y);
    if (value !== null) parts.push(`${map.name}: ${shortest(value)}`);
  });
  return parts.join(' · ');
}

let latest = null; // the last event of the pointer
function sayUnder(event = latest) {
  latest = event;
  const [x, y] = event ? shareOf.at(event) : [-1, -1];
  const isOnPicture = x >= 0 && y >= 0 && x < 1 && y < 1;
  under.textContent = isOnPicture ? wordsAt(x, y) : HINT;
}

for (const name of ['pointermove', 'pointerdown']) {
  frame.addEventListener(name, event => sayUnder(event), {capture: true, passive: true});
}
frame.addEventListener('pointerleave', event => {
  if (event.pointerType == 'mouse') sayUnder(null); // a finger that is lifted leaves its words
});
form.addEventListener('input', () => sayUnder());
under.hidden = false;
sayUnder();

// A copy for the picture that zooms; the original stays with the whole one, for paper.
function copyOf(element) {
  const copy = element.cloneNode(true);
  copy.style.width = copy.style.height = '';
  return copy;
}

function zoomable(tiles) {
  const host = document.createElement('div');
  const bar = one('#bar');
  const copies = over.map(copyOf);
  const isStill = matchMedia('(prefers-reduced-motion: reduce)').matches;
  host.id = 'zoom';
  over.push(...copies);
  root.classList.add('zoomable');
  frame.classList.add('zooming');
  frame.prepend(host);
  const viewer = window.viewer = OpenSeadragon({
    element: host,
    drawer: 'canvas',
    showNavigationControl: false,
    animationTime: isStill ? 0 : .5,
    maxZoomPixelRatio: 4,
    minZoomImageRatio: .8,
    visibilityRatio: .3,
    gestureSettingsMouse: {clickToZoom: false, dblClickToZoom: true},
    crossOriginPolicy: false,
    tileSources: {
      width: tiles.width,
      height: tiles.height,
      tileSize: tiles.tile,
      tileOverlap: 1,
      minLevel: 0,
      maxLevel: tiles.levels - 1,
      getTileUrl: (level, x, y) => `${tiles.path}/${level}/${x}_${y}.jpg`,
    },
  });
  viewer.canvas.setAttribute('role', 'application');
  viewer.canvas.setAttribute('aria-label', 'Picture of the slide, which zooms');

  // The scale bar: the longest of 1, 2 and 5 times a power of ten that has room.
  function scale() {
    if (!settings.spacing) return;
    const zoom = viewer.viewport.viewportToImageZoom(viewer.viewport.getZoom(true));
    const perMicron = zoom / settings.spacing; // pixels of the screen
    const wanted = Math.min(160, host.clientWidth / 3) / perMicron;
    const ten = 10 ** Math.floor(Math.log10(wanted));
    const length = [5, 2, 1].find(number => number * ten <= wanted) * ten;
    bar.hidden = false;
    bar.style.setProperty('--length', `${length * perMicron}px`);
    bar.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  }

  shareOf.at = point => {
    const box = host.getBoundingClientRect();
    const pixel = new OpenSeadragon.Point(point.clientX - box.left, point.clientY - box.top);
    const place = viewer.viewport.pointFromPixel(pixel, true);
    return [place.x, place.y * tiles.width / tiles.height];
  };

  viewer.addHandler('open', () => {
    for (const element of copies) {
      const width = +element.dataset.width;
      const height = +element.dataset.height * tiles.height / tiles.width;
      viewer.addOverlay({element, location: new OpenSeadragon.Rect(0, 0, width, height)});
    }
    arrange();
    scale();
  });
  for (const name of ['animation', 'zoom', 'resize']) viewer.addHandler(name, scale);
  viewer.addHandler('animation', () => sayUnder()); // the picture moves below the cursor

  // F would mirror the tissue and not what lies over it, R would turn it.
  viewer.addHandler('canvas-key', event => {
    if ([70, 82].includes(event.originalEvent.keyCode)) event.preventDefaultAction = true;
  });

  function sayWhatIsWrong() {
    const wrong = one('#wrong');
    wrong.hidden = false;
    wrong.textContent = 'A part of the picture cannot be read: the folder tiles has to lie beside '
      + 'the pages, as it was written.';
  }
  for (const name of ['open-failed', 'tile-load-failed']) viewer.addHandler(name, sayWhatIsWrong);

  function fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else one('#viewer').requestFullscreen();
  }
  const actions = {
    in: () => viewer.viewport.zoomBy(1.6),
    out: () => viewer.viewport.zoomBy(1 / 1.6),
    whole: () => viewer.viewport.goHome(),
    full: fullScreen,
  };
  form.addEventListener('click', event => {
    const action = actions[event.target.dataset.do];
    if (action) {
      action();
      viewer.viewport.applyConstraints();
    }
  });
}

if (settings.tiles && window.OpenSeadragon) zoomable(settings.tiles);
arrange();
