// Opens ComfyUI's page in Chromium; for each job loads one graph, may run it, takes a picture, prints one JSON line.
//
//   node drive.cjs CHROMIUM      stdin: paths of jobs, one a line
//   job.json: {url, graph, run, screenshot, size: [w, h], vue, locale, search, timeout}
//
// url: the running server. page: folder of another page that takes the place of the server's own, or null. graph: path
// of a workflow in UI format. build: a graph that is put together with the mouse instead (hands.cjs). run: queue it once
// and wait. cancel: kinds of nodes at which a run is cancelled, one run for each, before. screenshot: path of a .png, or
// null. size: of the window. vue: nodes drawn as HTML instead of on the canvas. locale: such as "en".
// search: what is typed into the search for nodes, or null. browse: the same for templates. export: whether to use File, Export (API). drop: path of a
// file that is dropped on the page afterwards, or null. complaint: whether to open what the page says of an error.
// places: {id: [x, y, width]} for a graph in API format, of which
// the screenshot then shows nothing but the nodes. The page stays open between jobs that see the same one, as a user's
// does who opens one workflow after the other.
// Answer: {types: unknown node types, widgets: {id: values}, missing: [{node, name, url, directory}], media: [names],
// errors: what failed (page, console, validation, execution), outputs: {id: output}, titles: [as shown], found: [titles that the
// search offers], shown: {id: {width, pictures: how many the node draws, texts: those of its read-only widgets,
// cut: pixels of these texts that do not fit into their boxes}},
// outside: [titles of nodes that reach out of their group before anything runs], exported: what the
// page saved, dropped: the workflow that is open after the drop, inserted: {title, widgets: [[name, label, value]]},
// offered: [titles of templates], built: {ids: {name: id}, missing: links that did not come about}, cancelled: {kind: [how its run ended]},
// complaint: text, help: text and pictures of the help page, app: {inputs: [labels], pictures: how many it shows}}
// or {failed: what drive.cjs itself could not do}

const fs = require('fs')
const path = require('path')
const readline = require('readline')
const { chromium } = require('playwright-core')
const { build, search } = require('./hands.cjs')

const FLAGS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-background-networking',
  '--disable-features=LocalNetworkAccessChecks', // refuses websockets to a page that `serve` answers
  '--disable-component-update',
  '--disable-sync'
]

const CANCEL = '[aria-label="Cancel current run"]'
const RUN_APP = '[data-testid="linear-run-button"]'
// What the page asks for and does without: help in its language, downloads of which it wants to know the size, what
// the registry knows of a node that failed.
const EXPECTED = /huggingface\.co|api\.comfy\.org|\/docs\/\w+\/[\w-]+\.md/

function isOurs(error) {
  return /bonsai|bitlinear/i.test(error) && !EXPECTED.test(error)
}

// Answers for the files of another page than the server's.
async function serve(page, url, folder) {
  await page.route(`${url}/**`, (route) => {
    const name = decodeURIComponent(new URL(route.request().url()).pathname)
    const file = path.join(folder, name === '/' ? 'index.html' : name)
    return fs.statSync(file, { throwIfNoEntry: false })?.isFile() ? route.fulfill({ path: file }) : route.continue()
  })
}

// What the page says when it has said the same for some time.
async function settled(page, look) {
  let last = null
  for (let same = 0, tries = 0; same < 3 && tries < 40; tries++) {
    const now = JSON.stringify(await page.evaluate(look))
    same = now === last ? same + 1 : 0
    last = now
    await page.waitForTimeout(150)
  }
  return JSON.parse(last)
}

async function openPage(browser, job) {
  const [width, height] = job.size || [1800, 1000]
  const page = await browser.newPage({ viewport: { width, height } })
  const failures = []
  page.on('pageerror', (error) => failures.push(`page: ${error.message}`))
  page.on('console', (message) => {
    if (message.type() === 'error' && isOurs(`${message.text()} ${message.location().url}`))
      failures.push(`console: ${message.text()} ${message.location().url}`)
  })
  const settings = {
    'Comfy.Locale': job.locale || 'en',
    'Comfy.VueNodes.Enabled': Boolean(job.vue),
    'Comfy.TutorialCompleted': true,
    'Comfy.PromptFilename': false,
    'Comfy.Workflow.Persist': false,
    'Comfy.Minimap.Visible': false,
    'Comfy.RightSidePanel.IsOpen': false
  }
  const answer = await fetch(`${job.url}/api/settings`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(settings)
  })
  if (!answer.ok) throw new Error(`the settings were refused: ${answer.status}`)
  if (job.page) await serve(page, job.url, job.page)
  await page.goto(job.url)
  await page.waitForFunction(
    () => window.app?.graph && window.LiteGraph?.registered_node_types?.BonsaiSampler,
    null,
    { timeout: job.timeout }
  )
  await page.waitForTimeout(500)
  return { page, failures }
}

// Runs in the page.
async function load(graph) {
  await window.app.loadGraphData(graph)
}

// Opens a template as a user does; it is there once the graph has its id.
async function openTemplate(page, title, graph) {
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates'))
  await page.getByText('Bonsai Image', { exact: true }).first().click()
  await page.locator(`[data-testid="template-workflow-${title}"]`).click()
  await page.waitForFunction((id) => window.app.graph.id === id, graph.id, { timeout: 30000 })
}

// Types words into the search of the template browser, which stays open; the titles that it offers then.
async function browse(page, words) {
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates'))
  await page.getByText('Bonsai Image', { exact: true }).first().waitFor({ timeout: 15000 })
  await page.getByText('All Templates', { exact: true }).first().click() // at a first start another one is open
  await page.locator('[role="dialog"] input').first().fill(words)
  const titles = () =>
    [...document.querySelectorAll('[data-testid^="template-workflow-"]')].map((card) => card.dataset.testid.slice(18))
  return settled(page, titles)
}

// Runs in the page.
function opened() {
  const pinia = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia.state.value
  const nodes = window.app.graph.nodes
  const known = window.LiteGraph.registered_node_types
  return {
    types: nodes.map((node) => node.type).filter((type) => !known[type]),
    widgets: Object.fromEntries(window.app.graph.serialize().nodes.map((node) => [node.id, node.widgets_values ?? []])),
    missing: (pinia.missingModel.missingModelCandidates || []).map((model) => ({
      node: String(model.nodeId),
      name: model.name,
      url: model.url,
      directory: model.directory
    })),
    media: (pinia.missingMedia.missingMediaCandidates || []).map((media) => media.name),
    titles: nodes.map((node) => node.getTitle()),
    errors: (pinia.missingNodesError.missingNodesError?.nodeTypes || []).map((type) => `missing node ${type.type ?? type}`)
  }
}

// Runs in the page. Resolves to {outputs, errors} when the prompt has ended; button: of these the last is
// pressed; null queues it. cancel: a kind of node and the button that is pressed once such a node runs.
async function run([timeout, button, cancel]) {
  const api = window.app.api ?? window.comfyAPI.api.api
  const outputs = {}
  const listeners = []
  const listen = (event, listener) => {
    api.addEventListener(event, listener)
    listeners.push([event, listener])
  }
  const ended = new Promise((resolve) => {
    const finish = (errors) => {
      for (const [event, listener] of listeners) api.removeEventListener(event, listener)
      resolve({ outputs, errors })
    }
    setTimeout(() => finish([`no end of the prompt within ${timeout / 1000} s`]), timeout)
    if (cancel)
      listen('executing', ({ detail }) => {
        if (window.app.graph.getNodeById(detail?.node ?? detail)?.type !== cancel[0]) return
        const press = () => {
          const [found] = document.querySelectorAll(cancel[1])
          if (found && !found.disabled) found.click()
          else setTimeout(press, 5)
        }
        press()
      })
    listen('executed', ({ detail }) => (outputs[detail.node] = detail.output))
    listen('execution_success', () => finish([]))
    listen('execution_interrupted', () => finish(['interrupted']))
    listen('execution_error', ({ detail }) =>
      finish([`node ${detail.node_id} (${detail.node_type}): ${detail.exception_type}: ${detail.exception_message}`])
    )
  })
  if (button) [...document.querySelectorAll(button)].at(-1).click()
  else await window.app.queuePrompt(0, 1)
  const refused = window.app.lastNodeErrors
  if (refused && Object.keys(refused).length) return { outputs, errors: [`refused: ${JSON.stringify(refused)}`] }
  return ended
}

// Runs in the page.
function shown() {
  const count = (node) => document.querySelectorAll(`[data-node-id="${node.id}"] img`).length
  const boxes = (node, widgets) => {
    const html = [...document.querySelectorAll(`[data-node-id="${node.id}"] textarea`)].filter((area) => area.readOnly)
    return html.length ? html : widgets.flatMap((widget) => widget.element ?? [])
  }
  return Object.fromEntries(
    window.app.graph.nodes.map((node) => {
      const reports = (node.widgets ?? []).filter((widget) => widget.options?.read_only)
      return [
        node.id,
        {
          width: node.size[0],
          pictures: node.imgs?.length || count(node),
          texts: reports.map((widget) => widget.value),
          cut: Math.max(0, ...boxes(node, reports).map((area) => area.scrollHeight - area.clientHeight))
        }
      ]
    })
  )
}

// Runs in the page. A node belongs to the group in which its upper left corner is.
function outside() {
  const { ds, canvas } = window.app.canvas
  const view = canvas.getBoundingClientRect()
  const whole = (node) => {
    const html = document.querySelector(`[data-node-id="${node.id}"]`)
    if (!html) return [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]
    const { x, y, width, height } = html.getBoundingClientRect()
    return [(x - view.x) / ds.scale - ds.offset[0], (y - view.y) / ds.scale - ds.offset[1], width / ds.scale, height / ds.scale]
  }
  const found = window.app.graph.nodes.filter((node) => {
    const [x, y, width, height] = whole(node)
    const group = window.app.graph.groups.find(
      ({ pos, size }) => x >= pos[0] && y >= pos[1] && x < pos[0] + size[0] && y < pos[1] + size[1]
    )
    return group && (x + width > group.pos[0] + group.size[0] || y + height > group.pos[1] + group.size[1])
  })
  return found.map((node) => node.getTitle())
}

// What the nodes show, once each picture that a node gave is there; as it is after ten seconds.
async function drawn(page, outputs) {
  const awaited = Object.keys(outputs).filter((id) => outputs[id]?.images?.length)
  for (let tries = 0; ; tries++) {
    const found = await page.evaluate(shown)
    if (tries === 50 || awaited.every((id) => found[id]?.pictures)) return found
    await page.waitForTimeout(200)
  }
}

// Opens a graph in API format, puts its nodes at their places and saves a picture of nothing but them.
async function portray(page, graph, places, path) {
  const clip = await page.evaluate(
    async ([graph, places]) => {
      await window.app.loadApiJson(graph, 'graph')
      for (const node of window.app.graph.nodes) {
        const [x, y, width] = places[node.id]
        node.setSize([width, node.computeSize()[1]])
        node.pos = [x, y]
      }
      const boxes = window.app.graph.nodes.map((node) => [...node.pos, node.pos[0] + node.size[0], node.pos[1] + node.size[1]])
      const margin = 24
      const left = Math.min(...boxes.map((box) => box[0])) - margin
      const top = Math.min(...boxes.map((box) => box[1])) - 30 - margin
      const right = Math.max(...boxes.map((box) => box[2])) + margin
      const bottom = Math.max(...boxes.map((box) => box[3])) + margin
      const { ds } = window.app.canvas
      ds.scale = 1
      ds.offset = [300 - left, 150 - top]
      window.app.canvas.setDirty(true, true)
      await new Promise((resolve) => setTimeout(resolve, 1000))
      const { x, y } = window.app.canvasEl.getBoundingClientRect()
      return { x: x + 300, y: y + 150, width: right - left, height: bottom - top }
    },
    [graph, places]
  )
  await page.screenshot({ path, clip })
  return { clip }
}

// The file that File, Export (API) saves.
async function exportGraph(page) {
  const saved = page.waitForEvent('download')
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.ExportWorkflowAPI'))
  return JSON.parse(fs.readFileSync(await (await saved).path(), 'utf8'))
}

// Drops a file on an empty place of the page; resolves to the workflow that it opens.
async function drop(page, path) {
  const file = { name: path.split('/').pop(), data: fs.readFileSync(path).toString('base64') }
  await page.evaluate(async () => window.app.loadGraphData({ nodes: [], links: [], version: 0.4 }))
  await page.evaluate(async ({ name, data }) => {
    const transfer = new DataTransfer()
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0))
    transfer.items.add(new File([bytes], name, { type: 'image/png' }))
    for (const kind of ['dragenter', 'dragover', 'drop'])
      window.app.canvasEl.dispatchEvent(
        new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true, clientX: 600, clientY: 300 })
      )
  }, file)
  await page.waitForFunction(() => window.app.graph.nodes.length, null, { timeout: 15000 })
  await page.waitForTimeout(500)
  return page.evaluate(() => window.app.graph.serialize())
}

// Puts what a search finds first onto the graph, and connects its first output to the Save Image there.
async function insert(page, name) {
  const saves = await page.evaluate(() => window.app.graph.nodes.map((node) => node.id))
  await search(page, name)
  await page.keyboard.press('Enter')
  await page.waitForTimeout(500)
  await page.mouse.click(700, 250) // the node follows the pointer until then
  await page.waitForFunction((known) => window.app.graph.nodes.length > known, saves.length, { timeout: 15000 })
  await page.waitForTimeout(1000)
  return page.evaluate((known) => {
    const node = window.app.graph.nodes.find(({ id }) => !known.includes(id))
    const save = window.app.graph.nodes.find(({ type }) => type === 'SaveImage')
    node.pos = [0, 0]
    save.pos = [node.size[0] + 80, 0]
    node.connect(0, save, 0)
    const widgets = (node.widgets ?? []).map(({ name, label, value }) => [name, label, value])
    return { title: node.getTitle(), widgets }
  }, saves)
}

// The help of an HTML node, opened with the button that appears over it when it is selected.
async function help(page, type) {
  const id = await page.evaluate((type) => window.app.graph.nodes.find((node) => node.type === type).id, type)
  await page.locator(`[data-node-id="${id}"]`).click({ position: { x: 60, y: 12 } })
  await page.locator('[data-testid="info-button"]').first().click()
  const found = page.locator('.node-help-content')
  await found.locator('h1').waitFor({ timeout: 15000 })
  await page.waitForTimeout(500)
  const widths = await found.locator('img').evaluateAll((images) => images.map((image) => image.naturalWidth))
  return { text: await found.innerText(), pictures: widths }
}

// Runs what is open in app mode; null where it is not.
async function runApp(page, timeout) {
  const button = page.locator(RUN_APP).first()
  if (!(await button.waitFor({ timeout: 15000 }).then(() => true, () => false))) return null
  await page.keyboard.press('Escape') // the tour that newer pages offer
  await page.waitForTimeout(500)
  const inputs = await page.locator('[data-testid="app-mode-widget-item"]').allInnerTexts()
  const ended = await page.evaluate(run, [timeout, `${RUN_APP} button`])
  const shown = page.locator('[data-testid="linear-center-panel"] img')
  await shown.first().waitFor({ timeout: 15000 })
  await page.locator('[data-testid="linear-cancel-run"]').waitFor({ state: 'detached', timeout: 15000 })
  await page.waitForTimeout(300)
  const widths = await shown.evaluateAll((images) => images.map((image) => image.naturalWidth))
  return { ...ended, inputs: inputs.map((text) => text.split('\n')[0]), pictures: widths }
}

async function fit(page) {
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView'))
  await settled(page, () => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset])
}

// Opens the details of the error that the page shows; what they say.
async function complaint(page) {
  await page.locator('[data-testid="error-overlay-see-errors"]').click({ timeout: 15000 })
  const panel = page.locator('[data-testid="runtime-error-panel"]')
  await panel.waitFor({ timeout: 15000 })
  return panel.innerText()
}

async function drive(page, failures, job) {
  failures.length = 0
  const graph = JSON.parse(fs.readFileSync(job.graph, 'utf8'))
  if (job.places) return portray(page, graph, job.places, job.screenshot)
  if (job.template) await openTemplate(page, job.template, graph)
  else await page.evaluate(load, graph)
  await page.waitForTimeout(300)
  const built = job.build && (await build(page, job.build))
  const answer = { built, cancelled: {}, ...(await settled(page, opened)) }
  if (job.app) answer.app = await runApp(page, job.timeout)
  else if (await page.locator(RUN_APP).count()) {
    await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.ToggleLinear'))
    await page.locator(RUN_APP).first().waitFor({ state: 'hidden', timeout: 15000 })
  }
  if (!answer.app && !built) await fit(page)
  answer.outside = await page.evaluate(outside)
  if (job.insert) answer.inserted = await insert(page, job.insert)
  if (job.export) answer.exported = await exportGraph(page)
  for (const kind of job.cancel ?? [])
    answer.cancelled[kind] = (await page.evaluate(run, [job.timeout, null, [kind, CANCEL]])).errors
  if (job.run) {
    const { outputs, errors } = await page.evaluate(run, [job.timeout, null])
    answer.outputs = outputs
    answer.errors.push(...errors)
    answer.shown = await drawn(page, outputs)
  }
  if (job.complaint) answer.complaint = await complaint(page)
  if (job.help) answer.help = await help(page, job.help)
  if (job.screenshot && !job.browse) {
    if (!answer.app && !built) await fit(page)
    await page.screenshot({ path: job.screenshot })
  }
  if (job.search) {
    answer.found = await search(page, job.search)
    await page.keyboard.press('Escape')
  }
  if (job.browse) {
    answer.offered = await browse(page, job.browse)
    if (job.screenshot) await page.screenshot({ path: job.screenshot })
    await page.keyboard.press('Escape')
  }
  if (job.drop) answer.dropped = await drop(page, job.drop)
  answer.errors.push(...failures)
  return answer
}

async function main() {
  const browser = await chromium.launch({ executablePath: process.argv[2], args: FLAGS })
  let open = null
  let seen = null
  for await (const path of readline.createInterface({ input: process.stdin })) {
    let answer, job
    try {
      job = { timeout: 300000, ...JSON.parse(fs.readFileSync(path, 'utf8')) }
      const sees = JSON.stringify([job.url, job.page, job.size, job.vue, job.locale])
      if (sees !== seen) {
        await open?.page.close()
        seen = null
        open = await openPage(browser, job)
        seen = sees
      }
      answer = await drive(open.page, open.failures, job)
    } catch (error) {
      seen = null // the next job gets a page of its own
      if (job?.screenshot) await open?.page.screenshot({ path: job.screenshot }).catch(() => {})
      answer = { failed: `${error.stack || error}` }
    }
    process.stdout.write(`${JSON.stringify(answer)}\n`)
  }
  await browser.close()
}

main().catch((error) => {
  process.stderr.write(`${error.stack || error}\n`)
  process.exit(1)
})
