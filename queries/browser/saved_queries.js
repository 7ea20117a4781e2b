// Saves queries in Neo4j Browser, in a folder of their own: open the Browser, then its page's developer tools (F12), paste this into the console.
// Neo4j Browser itself has no way to import queries; it keeps them where this puts them.
(() => {
  const folder = { id: "featlas", name: "featlas", isStatic: false };
  const queries = $queries;
  const kept = (name, mine) => JSON.parse(localStorage.getItem(name) || "[]").filter((entry) => !mine(entry));
  const folders = [...kept("neo4j.folders", (entry) => entry.id === folder.id), folder];
  const documents = [
    ...kept("neo4j.documents", (entry) => entry.folder === folder.id),
    ...queries.map((content, number) => ({ id: `featlas-$${number}`, folder: folder.id, content, isStatic: false })),
  ];
  // The Browser writes its own state when the page is left: ours is written after that.
  addEventListener("pagehide", () => {
    localStorage.setItem("neo4j.folders", JSON.stringify(folders));
    localStorage.setItem("neo4j.documents", JSON.stringify(documents));
  });
  location.reload();
})();
