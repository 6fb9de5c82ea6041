// What a user does on the page with mouse and keyboard: finds nodes, puts them down, connects them, cancels a run.

// What the search offers for these words: one text an entry, title first.
async function search(page, words) {
  await page.evaluate(() => window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle'))
  await page.locator('[role="dialog"] input').first().waitFor({ timeout: 15000 })
  await page.keyboard.type(words)
  const offered = page.locator('[role="option"]')
  await offered.first().waitFor({ timeout: 15000 })
  await page.waitForTimeout(300)
  return (await offered.allInnerTexts()).map((text) => text.trim())
}

// Finds a node by its title and puts it down at a point of the window; resolves to its id.
async function place(page, title, [x, y]) {
  const known = await page.evaluate(() => window.app.graph.nodes.map((node) => node.id))
  await search(page, title)
  const offered = page.locator('[role="option"]').filter({ hasText: new RegExp(`^\\s*${title.replace(/[()]/g, '\\$&')}`) })
  await offered.first().click()
  await page.waitForFunction((known) => window.app.graph.nodes.length > known, known.length, { timeout: 15000 })
  const follows = () => window.app.canvas.state.ghostNodeId != null // the node follows the pointer until a click
  await page.waitForFunction(follows, null, { timeout: 15000 })
  for (let tries = 0; tries < 20 && (await page.evaluate(follows)); tries++) {
    await page.mouse.move(x, y, { steps: 2 })
    await page.mouse.click(x, y) // while the search fades, it takes the click
    await page.waitForTimeout(150)
  }
  return page.evaluate((known) => window.app.graph.nodes.find(({ id }) => !known.includes(id)).id, known)
}

// Runs in the page. Where the dot of an input or output is in the window: that of an HTML node, or what is drawn.
function dot([id, isInput, name]) {
  const node = window.app.graph.getNodeById(id)
  const slot = (isInput ? node.inputs : node.outputs).findIndex((slot) => slot.name === name)
  if (slot < 0) throw new Error(`${node.type} has no ${name}`)
  const html = document.querySelector(`[data-slot-key="${id}-${isInput ? 'in' : 'out'}-${slot}"]`)
  if (html) {
    const { x, y, width, height } = html.getBoundingClientRect()
    return [x + width / 2, y + height / 2]
  }
  const { ds, canvas } = window.app.canvas
  const view = canvas.getBoundingClientRect()
  const [x, y] = node.getConnectionPos(isInput, slot)
  return [(x + ds.offset[0]) * ds.scale + view.x, (y + ds.offset[1]) * ds.scale + view.y]
}

// Draws a link with the mouse from an output to an input.
async function link(page, [from, output], [to, input]) {
  await page.mouse.move(...(await page.evaluate(dot, [from, false, output])))
  await page.mouse.down()
  await page.mouse.move(...(await page.evaluate(dot, [to, true, input])), { steps: 4 })
  await page.mouse.up()
}

// Builds a graph on the empty page. nodes: {name: [title, x, y]}; links: [[name, output, name, input]];
// values: {name: {widget: value}}. Resolves to {ids: {name: id}, missing: links that did not come about}.
async function build(page, { nodes, links, values }) {
  const ids = {}
  await page.evaluate(() => {
    window.app.canvas.ds.scale = 0.6
    window.app.canvas.setDirty(true, true)
  })
  for (const [name, [title, x, y]] of Object.entries(nodes)) ids[name] = await place(page, title, [x, y])
  await page.evaluate(
    ([ids, values]) => {
      for (const [name, given] of Object.entries(values))
        for (const [widget, value] of Object.entries(given))
          window.app.graph.getNodeById(ids[name]).widgets.find((known) => known.name === widget).value = value
    },
    [ids, values]
  )
  for (const [from, output, to, input] of links) await link(page, [ids[from], output], [ids[to], input])
  const made = await page.evaluate(() =>
    window.app.graph.nodes.flatMap((node) =>
      (node.inputs ?? []).filter(({ link }) => link != null).map(({ name, link }) => `${node.id} ${name} ${window.app.graph.links[link]?.origin_id ?? window.app.graph.links.get(link).origin_id}`)
    )
  )
  const missing = links.filter(([from, , to, input]) => !made.includes(`${ids[to]} ${input} ${ids[from]}`))
  return { ids, missing }
}

module.exports = { build, search }
