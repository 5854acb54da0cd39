package qc.model

import android.content.Context
import java.io.File

/** Copies the model out of the app's assets, where it cannot be memory-mapped; at the first start and after updates. */
fun install(context: Context, folder: String = "model"): File {
    val directory = File(context.filesDir, folder)
    val assets = context.assets
    val manifest = assets.open("$folder/manifest.json").use { it.readBytes() }
    val installed = File(directory, "manifest.json")
    if (installed.isFile && installed.readBytes().contentEquals(manifest)) return directory
    directory.mkdirs()
    for (name in assets.list(folder).orEmpty().filter { it != "manifest.json" }) {
        assets.open("$folder/$name").use { from -> File(directory, name).outputStream().use { from.copyTo(it) } }
    }
    installed.writeBytes(manifest) // last: it says that everything is there
    return directory
}
