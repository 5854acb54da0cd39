import CryptoKit
import Foundation

/// A file of the artifact cannot be used; the description starts with its name.
public struct ArtifactError: LocalizedError, Equatable {
    public let file: String
    public let reason: String

    public var errorDescription: String? { "\(file): \(reason)" }
}

/// The files of a model, and the manifest that says what they must be.
enum Artifact {
    private static let formatVersion = 1
    private static let manifestName = "manifest.json"
    private static let tokenizerName = "tokenizer.json"

    private struct Manifest: Decodable {
        struct Runtime: Decodable {
            let package: String
            let minimum: String
        }

        struct Entry: Decodable {
            let bytes: Int
            let sha256: String
        }

        let format_version: Int
        let runtime: Runtime
        let files: [String: Entry]
    }

    /// Compares the runtime's version and the size and SHA-256 of every file of `wanted` with the manifest.
    ///
    /// - Parameter runtime: The version of the runtime, or nil if the model needs none.
    static func check(_ directory: URL, _ wanted: [String], runtime: String?) throws {
        let manifest = try read(directory.appendingPathComponent(manifestName))
        if let runtime { try checkRuntime(runtime, manifest.runtime) }
        for name in Interface.hasTokenizer ? wanted + [tokenizerName] : wanted {
            guard let entry = manifest.files[name] else {
                throw ArtifactError(file: name, reason: "missing in the manifest; compile the model again")
            }
            try checkFile(directory.appendingPathComponent(name), name, entry)
        }
    }

    private static func read(_ file: URL) throws -> Manifest {
        guard let data = try? Data(contentsOf: file) else {
            throw ArtifactError(file: manifestName, reason: "missing at \(file.path)")
        }
        let manifest: Manifest
        do {
            manifest = try JSONDecoder().decode(Manifest.self, from: data)
        } catch {
            throw ArtifactError(file: manifestName, reason: "not a readable manifest (\(error))")
        }
        guard manifest.format_version == formatVersion else {
            let found = manifest.format_version
            throw ArtifactError(file: manifestName, reason: "expected format version \(formatVersion), found \(found)")
        }
        return manifest
    }

    private static func checkRuntime(_ found: String, _ runtime: Manifest.Runtime) throws {
        if found.compare(runtime.minimum, options: .numeric) == .orderedAscending {
            let needed = "\(runtime.package) \(runtime.minimum)"
            throw ArtifactError(file: manifestName, reason: "the model needs \(needed) or later, found \(found)")
        }
    }

    private static func checkFile(_ file: URL, _ name: String, _ entry: Manifest.Entry) throws {
        guard let handle = try? FileHandle(forReadingFrom: file) else {
            throw ArtifactError(file: name, reason: "missing at \(file.path)")
        }
        defer { try? handle.close() }
        var digest = SHA256()
        var size = 0
        while let part = try handle.read(upToCount: 1 << 20), !part.isEmpty {
            digest.update(data: part)
            size += part.count
        }
        guard size == entry.bytes else {
            throw ArtifactError(file: name, reason: "expected \(entry.bytes) bytes, found \(size)")
        }
        let found = digest.finalize().map { String(format: "%02x", $0) }.joined()
        guard found == entry.sha256 else {
            let reason = "content differs from the manifest's SHA-256; copy it again from its origin"
            throw ArtifactError(file: name, reason: reason)
        }
    }
}
