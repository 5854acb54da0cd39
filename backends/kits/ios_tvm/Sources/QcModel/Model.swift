import CQcModel
import Foundation

/// The model as a library without a runtime. For one task at a time.
public final class Model {
    private static let files = ["model.weights"]

    private let weights: OpaquePointer
    private let instance: OpaquePointer
    private let text: Text?

    /// Checks every file against the manifest, then maps the weights.
    ///
    /// - Parameter threads: For computing; the performance cores of most phones if absent.
    public init(_ directory: URL, threads: Int32 = 2) async throws {
        try Artifact.check(directory, Self.files, runtime: nil)
        text = Interface.hasTokenizer ? try await Text(directory) : nil
        var opened: OpaquePointer?
        try succeed(qc_open(directory.appendingPathComponent("model.weights").path, &opened))
        var options = qc_options()
        options.threads = threads
        var created: OpaquePointer?
        let code = qc_create(opened, nil, &options, &created)
        guard let opened, let created, code == QC_OK else {
            qc_close(opened)
            throw failure(code)
        }
        weights = opened
        instance = created
    }

    deinit {
        qc_destroy(instance)
        qc_close(weights)
    }

    /// Runs once: the sizes of the dimensions, and one array per port, in the order of model.h.
    public func run(_ dims: [Int64], inputs: [UnsafeRawPointer?], outputs: [UnsafeMutableRawPointer?]) throws {
        precondition(dims.count == Int(QC_DIMENSIONS), "expected the size of each of \(QC_DIMENSIONS) dimensions")
        precondition(inputs.count == Interface.inputs.count, "expected one array per input, or nil")
        precondition(outputs.count == Interface.outputs.count, "expected one array per output, or nil")
        try succeed(qc_run(instance, dims, inputs, outputs))
    }
@@swift_generate@@}

/// Throws what a function of the library returns, unless all went well.
private func succeed(_ code: Int32) throws {
    if code != QC_OK { throw failure(code) }
}

private func failure(_ code: Int32) -> ArtifactError {
    ArtifactError(file: "model.weights", reason: String(cString: qc_error(code)))
}
