package qc.model

import java.io.File
import java.io.IOException
import java.security.MessageDigest
import org.json.JSONException
import org.json.JSONObject

/** A file of the artifact cannot be used; the message starts with its name. */
class ArtifactException(val file: String, reason: String) : IOException("$file: $reason")

/** The files of a model, and the manifest that says what they must be. */
internal object Artifact {
    private const val FORMAT_VERSION = 1
    private const val MANIFEST = "manifest.json"
    private const val TOKENIZER = "tokenizer.json"

    /** The least version of the runtime where the manifest counts in those of a plugin. */
    private val WITH_PLUGIN = mapOf("onnxruntime-qnn" to "@@with_qnn@@")

    /**
     * Compares the runtime's version and the size and SHA-256 of every file of [wanted] with the manifest.
     *
     * @param runtime The version of the runtime, or null if the model needs none.
     */
    fun check(directory: File, wanted: List<String>, runtime: String?): JSONObject {
        val manifest = read(File(directory, MANIFEST))
        val version = manifest.optInt("format_version")
        if (version != FORMAT_VERSION) {
            throw ArtifactException(MANIFEST, "expected format version $FORMAT_VERSION, found $version")
        }
        if (runtime != null) checkRuntime(runtime, manifest.getJSONObject("runtime"))
        val files = manifest.getJSONObject("files")
        val names = if (Interface.HAS_TOKENIZER) wanted + TOKENIZER else wanted
        for (name in names) {
            val entry = files.optJSONObject(name)
                ?: throw ArtifactException(name, "missing in the manifest; compile the model again")
            checkFile(File(directory, name), name, entry.getLong("bytes"), entry.getString("sha256"))
        }
        return manifest
    }

    private fun read(file: File): JSONObject {
        if (!file.isFile) throw ArtifactException(MANIFEST, "missing at $file")
        try {
            return JSONObject(file.readText())
        } catch (error: JSONException) {
            throw ArtifactException(MANIFEST, "not readable JSON (${error.message})")
        }
    }

    private fun checkRuntime(found: String, runtime: JSONObject) {
        val name = runtime.getString("package")
        val minimum = WITH_PLUGIN[name] ?: runtime.getString("minimum")
        val have = numbers(found)
        val need = numbers(minimum)
        val at = need.indices.firstOrNull { need[it] != have.getOrElse(it) { 0 } } ?: return
        if (have.getOrElse(at) { 0 } < need[at]) {
            throw ArtifactException(MANIFEST, "the model needs $name $minimum or later, found $found")
        }
    }

    private fun numbers(version: String): List<Int> = version.split('.', '-').mapNotNull { it.toIntOrNull() }

    private fun checkFile(file: File, name: String, bytes: Long, sha256: String) {
        if (!file.isFile) throw ArtifactException(name, "missing at $file")
        if (file.length() != bytes) throw ArtifactException(name, "expected $bytes bytes, found ${file.length()}")
        val digest = MessageDigest.getInstance("SHA-256")
        file.inputStream().use { stream ->
            val buffer = ByteArray(1 shl 16)
            while (true) {
                val count = stream.read(buffer)
                if (count < 0) break
                digest.update(buffer, 0, count)
            }
        }
        if (digest.digest().joinToString("") { "%02x".format(it) } != sha256) {
            throw ArtifactException(name, "content differs from the manifest's SHA-256; copy it again from its origin")
        }
    }
}
